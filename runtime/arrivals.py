"""Training data whose tokens are still being made: a process of its own writes shards, and training begins with the first.

One process of each machine tokenizes: that of the leader, and on machines that do not see the leader's cache the first of
their ranks. A step waits until all ranks have its data (`loop.py`), where signals and the errors of others are heard, and
never in a thread.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import minitron
from minitron.runtime.course import Course, corpus_seed
from minitron.runtime.data import Corpus, CorpusPart, Data, Wanted, corpus_parts, growing_corpus, require_tokens
from minitron.runtime.tokens import TextEncoder, finished, token_stream
from minitron.runtime.world import World
from minitron.specs.atomic import temporary_path, writing
from minitron.specs.blocks.distill import ShuffledBlocks
from minitron.specs.cache import mark_used
from minitron.specs.errors import MinitronError, WorkError
from minitron.specs.progress import Progress
from minitron.specs.shards.growing import GrowingStream
from minitron.specs.shards.process import request, tokenize
from minitron.specs.shards.stream import Largest, TokenStream
from minitron.specs.shards.writer import Part
from minitron.specs.training_plan import TrainingPlan

COMMAND = (sys.executable, "-P", "-m", "minitron.specs.shards.process")


class Arrivals:
    """The streams of a training that are still written."""

    def __init__(self, parts: Sequence[Part], streams: Sequence[GrowingStream], progress: Progress) -> None:
        self.wanted = [(stream, part.until) for part, stream in zip(parts, streams, strict=True)]
        self.progress = progress
        self.process: TokenizingProcess | None = None
        self.check: Callable[[Largest], None] = lambda largest: None
        """Raises where the models have no row for a token of a shard that has arrived."""

        self.error: MinitronError | None = None
        """The error because of which the rest will not arrive."""

    @property
    def complete(self) -> bool:
        """Tells whether all that the training reads is there."""
        return all(stream.reaches(until) for stream, until in self.wanted)

    def poll(self) -> None:
        """Takes in what has arrived, and the messages and the end of the process that tokenizes."""
        if self.error is not None or (self.complete and self.process is None):
            return
        process = self.process
        ended = process is not None and process.ended()  # first: what it has written is there then
        try:
            for stream, _ in self.wanted:
                for index in stream.poll():
                    self.check(index.largest)
                if stream.ended:
                    require_tokens(stream)
            if process is None:
                return
            process.hear(self.progress)
            if ended:
                self.close()
                if not self.complete:
                    raise process.failure()
        except MinitronError as error:
            self.error = error

    @property
    def documents(self) -> int:
        return sum(stream.documents for stream, _ in self.wanted)

    def close(self) -> None:
        """Ends the process that tokenizes. What it has written whole is gone on with by the next."""
        if self.process is not None:
            self.process.close()
            self.process = None


class TokenizingProcess:
    """`minitron.specs.shards.process`, which writes shards as long as this process keeps its stdin open."""

    def __init__(self, rounds: Sequence[Sequence[Part]], encoder: TextEncoder) -> None:
        here = str(Path(minitron.__file__).resolve().parent.parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the training, which ends this process then
        )
        self._said: deque[str] = deque()
        self._error: str | None = None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its end is heard of as at any other time
            self._process.stdin.write(request(rounds, encoder.tokenizing()))
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # a library, or a start-up file of the user's Python, has printed something
                continue
            if "error" in said:
                self._error = said["error"]
            else:
                self._said.append(said["message"])

    def ended(self) -> bool:
        if self._process.poll() is None:
            return False
        self._listener.join()
        return True

    def hear(self, progress: Progress) -> None:
        """Shows what the process has said since."""
        while self._said:
            progress.message(self._said.popleft())

    def failure(self) -> WorkError:
        """Returns the reason for which the process has ended before all was written."""
        if self._error is not None:
            return WorkError(self._error)
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        memory = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        return WorkError(
            f"the process that tokenizes {how}{memory}; start the same command again: it goes on after the last whole shard"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def wanted_of(plan: TrainingPlan, corpus: int) -> Wanted:
    """Returns what a training draws from the corpus with this number."""
    course = Course.of(plan)
    stretch, tokens = course.corpora()[corpus]
    return Wanted(
        length=stretch.phase.sequence_length,
        tokens=tokens,
        seed=corpus_seed(plan.seed, corpus),
        block=plan.shuffle.block if isinstance(plan.shuffle, ShuffledBlocks) else None,
        samples=course.samples(corpus),
    )


def begin_corpora(
    of: Sequence[tuple[Data, Wanted]], encoder: TextEncoder, cache: Path, world: World, progress: Progress
) -> tuple[tuple[Corpus, ...], Arrivals | None]:
    """Opens corpora whose tokens may still be made, and begins to make those that are missing; None in the place of the
    arrivals where none are. Errors that the leader meets are raised on all ranks.
    """
    corpora = [corpus_parts(data, encoder, cache, wanted) for data, wanted in of]
    parts = _merged(corpora)
    streams = {folder: GrowingStream(folder) for folder in parts}
    world.from_leader(lambda: _settle(parts, progress))
    if world.local_rank == 0 and not world.leads:  # on another machine, whose cache may be its own
        _settle(parts, progress)
    world.wait()
    arrivals = Arrivals(list(parts.values()), list(streams.values()), progress)
    arrivals.poll()
    writes = world.any(not arrivals.complete) and _writes(cache, world)
    rounds = [[parts[one.folder] for one in corpus if one.folder in parts] for corpus in corpora]
    if encoder.encoder.recipe.tokenizer is None:
        _write_first(rounds, arrivals, encoder, world, writes=writes)
    arrivals.poll()
    if arrivals.error is not None:
        raise arrivals.error
    opened = tuple(
        growing_corpus(
            data, [_stream(one, streams, encoder, cache, world, progress) for one in corpus], encoder, wanted
        )
        for (data, wanted), corpus in zip(of, corpora, strict=True)
    )
    if not world.any(not arrivals.complete):
        return opened, None
    if writes and not arrivals.complete:
        arrivals.process = TokenizingProcess(rounds, encoder)
    return opened, arrivals


def _merged(corpora: Sequence[Sequence[CorpusPart]]) -> dict[Path, CorpusPart]:
    """Returns the parts that are tokenized, each stream once, up to where the last that reads it needs it."""
    found: dict[Path, CorpusPart] = {}
    for part in (part for parts in corpora for part in parts if part.source.megatron is None):
        other = found.get(part.folder, part)
        until = None if part.until is None or other.until is None else max(part.until, other.until)
        found[part.folder] = replace(other, until=until)
    return found


def _settle(parts: Iterable[Path], progress: Progress) -> None:
    """Checks the streams that are said to be whole, before anybody reads them: those that are damaged are made again. A
    stream that is written as far as trainings have read it is used like a whole one.
    """
    for folder in parts:
        if finished(folder, progress) is None:
            mark_used(folder)


def _writes(cache: Path, world: World) -> bool:
    """Tells whether this rank is the one of its machine that tokenizes. Only where tokens are missing: a cache that holds
    them all need not be one that can be written to.
    """
    seen = _sees_leader(cache, world)
    return world.leads or (world.local_rank == 0 and not seen)


def _sees_leader(cache: Path, world: World) -> bool:
    """Tells whether this rank sees what the leader writes into its cache; a cache may be a disk of each machine's own."""
    if world.size == 1:
        return True

    def leave() -> str:
        name = temporary_path(cache / "seen", uuid4().hex).name
        with writing(str(cache)):
            cache.mkdir(parents=True, exist_ok=True)
            (cache / name).touch()
        return name

    name = world.from_leader(leave)
    seen = (cache / name).exists()
    world.wait()
    if world.leads:
        (cache / name).unlink(missing_ok=True)
    return seen


def _write_first(
    rounds: Sequence[Sequence[Part]], arrivals: Arrivals, encoder: TextEncoder, world: World, *, writes: bool
) -> None:
    """Writes what is missing before anything else is done: a tokenizer that is written in Python has no process of its
    own.
    """

    def write() -> None:
        arrivals.poll()
        if arrivals.error is None and not arrivals.complete:
            arrivals.progress.message(
                "this tokenizer is written in Python: training begins when all its tokens are there"
            )
            tokenize(rounds, encoder.tokenizing(), arrivals.progress)

    world.from_leader(write)
    if writes and not world.leads:
        write()
    world.wait()


def _stream(
    part: CorpusPart,
    streams: Mapping[Path, GrowingStream],
    encoder: TextEncoder,
    cache: Path,
    world: World,
    progress: Progress,
) -> GrowingStream | TokenStream:
    """Returns the stream of a part; tokens of Megatron-LM are read where they lie."""
    if part.folder in streams:
        return streams[part.folder]
    return world.leader_first(
        lambda: token_stream(part.source, part.content, encoder, cache, progress, limit=part.limit, marks=part.marks)
    )
