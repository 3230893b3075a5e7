"""The loop of every training: step after step, with metrics, held-out loss and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from minitron.runtime.checkpoint import TrainerState
from minitron.runtime.data_wait import arriving, wait_for_data
from minitron.runtime.disk import writing
from minitron.runtime.dry_pass import check_memory
from minitron.runtime.held_out import HeldOut, held_out
from minitron.runtime.interrupt import Interrupt
from minitron.runtime.metrics import MetricsLog
from minitron.runtime.out_of_memory import told_in_a_sentence
from minitron.runtime.pieces import model_pieces, optimizer_pieces
from minitron.runtime.setup import Run
from minitron.runtime.step import train_step
from minitron.runtime.trackers import TrackerSettings
from minitron.runtime.utilisation import peak_flops, peak_memory, utilisation
from minitron.specs.builds import METRICS
from minitron.specs.errors import MinitronError, WorkError
from minitron.specs.progress import Progress, Task

_SHOWN = ("loss", "held_out_loss", "lr", "mfu", "memory_bytes")
"""The figures that a user sees during training, besides tokens, their rate and the time left."""


def learn(run: Run, state: TrainerState, interrupt: Interrupt, progress: Progress, name: str = "train") -> None:
    """Runs steps until all tokens are learnt; measures the held-out loss and saves checkpoints after each multiple of
    the plan's numbers of tokens, and at the end.

    The points of measuring and saving depend on the tokens alone, so that a training that was killed and resumed is the
    same training.
    """
    plan, device = run.plan, run.world.device
    with (
        run.beside,
        told_in_a_sentence(plan),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _metrics(run, state, progress) as metrics,
        progress.task(name, plan.trained_tokens, "tokens", done=state.tokens) as task,
    ):
        check_memory(run)
        loop = _Loop(run, state, metrics, interrupt, progress, task)
        while not loop.at_end:
            loop.step()


class _Loop:
    """One training, step by step. `state` is how far it is; `_saved` is the last step that has a checkpoint."""

    def __init__(
        self,
        run: Run,
        state: TrainerState,
        metrics: MetricsLog | None,
        interrupt: Interrupt,
        progress: Progress,
        task: Task,
    ) -> None:
        self.run, self.state, self.metrics = run, state, metrics
        self.interrupt, self.progress, self.task = interrupt, progress, task
        self._saved = state.step
        self._pace = Pace(run.plan.trained_tokens)
        self._peak = peak_flops(run.world.device, run.compute_dtype)
        self._measure_every = None if run.plan.held_out is None else run.plan.held_out.every_tokens

    @property
    def at_end(self) -> bool:
        """Tells whether all steps are done."""
        return self.state.step >= self.run.plan.steps

    def step(self) -> None:
        """Runs one step, reports its figures, and saves a checkpoint where one is due. KeyboardInterrupt, after a
        checkpoint, where the user has asked the training to stop.
        """
        run, before, start = self.run, self.state, time.perf_counter()
        self._wait_for_data()
        waited = time.perf_counter() - start
        try:
            figures = train_step(run, before)
        except WorkError:  # what all ranks saw together: the checkpoint that is being written is worth having
            run.saver.finish()
            raise
        self.state = run.course.state(before.step + 1)
        speed = self._speed(before, waited, time.perf_counter() - start)
        line = {"step": self.state.step, "tokens": self.state.tokens, **figures, **speed}
        if run.held_out is not None and (self.at_end or _crosses(before, self.state, self._measure_every)):
            result = measure_held_out(run)
            line |= {"held_out_loss": result.loss, "held_out_perplexity": result.perplexity}
        stop = self._report(line, self.state.tokens - before.tokens)
        if self.at_end or stop or _crosses(before, self.state, run.plan.checkpoint.every_tokens):
            self._save(line.get("held_out_loss"))
        if self.at_end or stop:
            run.saver.finish()
        if stop and not self.at_end:
            raise self._interrupted()

    def _wait_for_data(self) -> None:
        """Waits until the tokens of the next step are there. Where they do not come, or the user has asked to stop
        meanwhile, what the steps before have learnt is saved first.
        """
        try:
            arrived = wait_for_data(self.run, self.state.step, self.interrupt, self.task)
        except MinitronError:
            with suppress(WorkError):
                self._save_learnt()
            raise
        if not arrived:
            self._save_learnt()
            raise self._interrupted()

    def _speed(self, before: TrainerState, waited: float, seconds: float) -> dict[str, float]:
        """Returns the figures of a step that took `seconds`, the time that was `waited` for data included."""
        run, state = self.run, self.state
        rate = (state.tokens - before.tokens) / seconds
        figures = {
            "tokens_per_second": round(rate, 1),
            "data_seconds": round(waited + run.feed.seconds, 4),
            "seconds_left": self._pace.seconds_left(state.tokens, rate),
            "memory_bytes": peak_memory(run.world.device),
        }
        flops = run.course.at(before.step).phase.flops_per_token
        if (mfu := utilisation(flops, rate, self._peak, run.world.size)) is not None:
            figures["mfu"] = round(mfu, 4)
        return figures

    def _report(self, line: Mapping[str, float], tokens: int) -> bool:
        """Writes and shows the figures of a step of so many `tokens`, and publishes a checkpoint that is written. Tells
        whether any rank was asked to stop. WorkError on all ranks where metrics or checkpoint could not be written.
        """
        run, world = self.run, self.run.world
        broken = _write(self.metrics, line)
        self.task.advance(tokens, **{key: line[key] for key in _SHOWN if key in line}, **arriving(run))
        stop, writing, failed, unwritten = world.any_of(
            self.interrupt.requested, *run.saver.status(), broken is not None
        )
        if unwritten:
            run.saver.finish()
            world.from_leader(lambda: _complain(broken))
        run.saver.settle(writing=writing, failed=failed)
        return stop

    def _save_learnt(self) -> None:
        """Saves a checkpoint where steps were learnt after the last one, and waits until it is written."""
        if self.state.step > self._saved:
            self._save(None)
        self.run.saver.finish()

    def _save(self, held_out_loss: float | None) -> None:
        if self.metrics is not None:
            self.metrics.sync()
        module = self.run.student.module
        pieces = {"model": model_pieces(module), "optimizer": optimizer_pieces(module, self.run.optimizer)}
        self.run.saver.start(self.state, pieces, held_out_loss)
        self._saved = self.state.step

    def _interrupted(self) -> KeyboardInterrupt:
        self.progress.message(f"interrupted after step {self.state.step}; train again to go on from there")
        return KeyboardInterrupt()


class Pace:
    """The speed of a training since this process began, all that it does between steps included, but for the first step, which
    compiles."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._begun = tokens, (0.0, 0)

    def seconds_left(self, done: int, rate: float) -> float:
        """Returns the time that the rest will take after `done` tokens; `rate` is that of the last step."""
        now, (start, first) = time.perf_counter(), self._begun
        if not first:
            self._begun = now, done
        else:
            rate = (done - first) / (now - start)
        return round((self._tokens - done) / rate, 1)


def _write(metrics: MetricsLog | None, line: Mapping[str, float]) -> WorkError | None:
    """Writes a line of the metrics, on the rank that writes them. Returns the error instead of raising it, so that all
    ranks stop together: the others would wait for a rank that stopped alone.
    """
    try:
        if metrics is not None:
            metrics.write(line)
    except WorkError as error:
        return error
    return None


def _complain(error: WorkError | None) -> None:
    if error is not None:
        raise error


def measure_held_out(run: Run) -> HeldOut:
    assert run.held_out is not None
    return held_out(
        run.student,
        run.held_out,
        run.world,
        batch_size=run.plan.micro_batch_size,
        compute_dtype=run.compute_dtype,
    )


def _crosses(before: TrainerState, after: TrainerState, every: int | None) -> bool:
    """Checks whether a multiple of `every` tokens lies between two states."""
    return every is not None and before.tokens // every < after.tokens // every


@contextmanager
def _metrics(run: Run, state: TrainerState, progress: Progress) -> Iterator[MetricsLog | None]:
    """Opens the metrics log on the rank that writes it; yields None on the others."""
    opened: list[MetricsLog] = []

    def open_log() -> None:
        with writing(str(run.work / METRICS)):
            opened.append(MetricsLog(run.work, state.step, progress, _trackers(run)))

    run.world.from_leader(open_log)
    if not opened:
        yield None
        return
    with opened[0] as log:
        yield log


def _trackers(run: Run) -> TrackerSettings:
    plan = run.plan
    shown = ("tokens", "sequence_length", "global_batch_size", "seed", "weights")
    values: dict[str, Any] = {key: getattr(plan, key) for key in shown}
    values |= {f"optimizer.{key}": value for key, value in plan.optimizer.model_dump(mode="json").items()}
    return TrackerSettings(plan.track, f"{plan.name}: {plan.output}", values)
