"""The batches of a rank, prepared while the step before them is computed.

Reading memory-mapped tokens and stored samples, cutting them into micro batches, and finding the valid positions on the
host take milliseconds in which a GPU would be idle; a copy from memory that is not pinned would make the host wait for
the device. So a thread prepares the next step's batch in pinned memory, and its copies are queued before the step
computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from minitron.runtime.course import Course, Stretch
from minitron.runtime.data import Batch, Corpus
from minitron.runtime.loss import SampledTargets
from minitron.runtime.teacher_logits import StoredLogits
from minitron.runtime.world import World


@dataclass(frozen=True)
class Given:
    """The data of one rank for a step. `batch` holds all of them on the host, with `valid` tokens to predict; the micro
    batches are on the device, each with the teacher's samples where these replace the teacher.
    """

    batch: Batch
    valid: int
    micro_batches: list[tuple[Batch, SampledTargets | None]]


class Feed:
    """Hands out the batch of a step, and prepares the next one meanwhile."""

    def __init__(
        self, corpora: Sequence[Corpus], stored: StoredLogits | None, world: World, course: Course, steps: int
    ) -> None:
        """Takes the corpora of the course's phases. `steps` is the number of steps in all."""
        self.corpora, self.stored, self.world = corpora, stored, world
        self.course, self.steps = course, steps
        self._worker = ThreadPoolExecutor(1, "feed")
        self._next: tuple[int, Future[Given]] | None = None
        self.seconds = 0.0
        """The time that the last batch was waited for."""

    def ready(self, step: int) -> bool:
        """Tells whether the tokens of this rank's batch are there."""
        stretch, samples = self._samples(step)
        return self.corpora[stretch.corpus].ready(samples)

    def take(self, step: int) -> Given:
        """Returns the batch of a step that is `ready`, on the device. Errors in reading the batch are raised here."""
        start = time.perf_counter()
        begun = self._next is not None and self._next[0] == step
        made = self._next[1].result() if self._next is not None and begun else self._make(step)
        self._next = None
        self.seconds = time.perf_counter() - start
        if (following := step + 1) < self.steps and self.ready(following):
            self._next = following, self._worker.submit(self._make, following)
        device = self.world.device
        on_device = [
            (micro.to(device), None if targets is None else targets.to(device)) for micro, targets in made.micro_batches
        ]
        return Given(made.batch, made.valid, on_device)

    def _samples(self, step: int) -> tuple[Stretch, range]:
        """Returns the stretch of a step, and the numbers of this rank's samples in its corpus."""
        stretch = self.course.at(step)
        first = stretch.first(step)
        return stretch, self.world.share(range(first, first + stretch.phase.global_batch_size))

    def _make(self, step: int) -> Given:
        stretch, samples = self._samples(step)
        batch = self.corpora[stretch.corpus].batch(samples)
        micro = stretch.phase.micro_batch_size
        return Given(batch, int(batch.valid_BL.sum()), list(self._micro_batches(batch, samples, micro)))

    def _micro_batches(self, batch: Batch, samples: range, size: int) -> Iterator[tuple[Batch, SampledTargets | None]]:
        pinned = self.world.device.type == "cuda"
        for number, micro in enumerate(batch.micro_batches(size)):
            start = number * size
            targets = None if self.stored is None else self.stored.read(samples[start : start + size])
            if pinned:
                micro, targets = micro.pinned(), None if targets is None else targets.pinned()
            yield micro, targets
