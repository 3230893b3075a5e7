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
from minitron.specs.progress import Progress

_SHOWN = ("loss", "held_out_loss", "lr", "mfu", "memory_bytes")
"""The figures that a user sees during training, besides tokens, their rate and the time left."""


def learn(run: Run, state: TrainerState, interrupt: Interrupt, progress: Progress, name: str = "train") -> None:
    """Runs steps until all tokens are learnt; measures the held-out loss and saves checkpoints after each multiple of
    the plan's numbers of tokens, and at the end.

    The points of measuring and saving depend on the tokens alone, so that a training that was killed and resumed is the
    same training.
    """
    plan, world = run.plan, run.world
    peak = peak_flops(world.device, run.compute_dtype)
    measure_every = plan.held_out.every_tokens if plan.held_out is not None else None
    with (
        run.beside,
        told_in_a_sentence(plan),
        torch.random.fork_rng([world.device] if world.device.type == "cuda" else []),
        _metrics(run, state, progress) as metrics,
        progress.task(name, plan.trained_tokens, "tokens", done=state.tokens) as task,
    ):
        check_memory(run)
        pace, saved = Pace(plan.trained_tokens), state.step
        while state.step < plan.steps:
            start, before = time.perf_counter(), state
            try:
                arrived = wait_for_data(run, state.step, interrupt, task)
            except MinitronError:  # not of the steps that are done: what they have learnt is kept
                with suppress(WorkError):
                    _keep(run, state, metrics, saved)
                raise
            if not arrived:
                _keep(run, state, metrics, saved)
                raise _interrupted(state, progress)
            waited = time.perf_counter() - start
            try:
                figures = train_step(run, before)
            except WorkError:  # what all ranks saw together: the checkpoint that is being written is worth having
                run.saver.finish()
                raise
            state = run.course.state(before.step + 1)
            tokens = state.tokens - before.tokens
            rate = tokens / (time.perf_counter() - start)
            line = {"step": state.step, "tokens": state.tokens, **figures, "tokens_per_second": round(rate, 1)}
            line["data_seconds"] = round(waited + run.feed.seconds, 4)
            line["seconds_left"] = pace.seconds_left(state.tokens, rate)
            line["memory_bytes"] = peak_memory(world.device)
            if (
                mfu := utilisation(run.course.at(before.step).phase.flops_per_token, rate, peak, world.size)
            ) is not None:
                line["mfu"] = round(mfu, 4)
            last = state.step == plan.steps
            if run.held_out is not None and (last or _crosses(before, state, measure_every)):
                result = measure_held_out(run)
                line |= {"held_out_loss": result.loss, "held_out_perplexity": result.perplexity}
            broken = _write(metrics, line)
            task.advance(tokens, **{key: line[key] for key in _SHOWN if key in line}, **arriving(run))
            stop, writing, failed, unwritten = world.any_of(
                interrupt.requested, *run.saver.status(), broken is not None
            )
            if unwritten:
                run.saver.finish()
                world.from_leader(lambda error=broken: _complain(error))  # type: ignore[misc]
            run.saver.settle(writing=writing, failed=failed)
            if last or stop or _crosses(before, state, plan.checkpoint.every_tokens):
                _save(run, state, metrics, line.get("held_out_loss"))
                saved = state.step
            if last or stop:
                run.saver.finish()
            if stop and not last:
                raise _interrupted(state, progress)


def _interrupted(state: TrainerState, progress: Progress) -> KeyboardInterrupt:
    progress.message(f"interrupted after step {state.step}; train again to go on from there")
    return KeyboardInterrupt()


def _keep(run: Run, state: TrainerState, metrics: MetricsLog | None, saved: int) -> None:
    """Saves a checkpoint of all steps where there are some behind `saved`, the last that has one."""
    if state.step > saved:
        _save(run, state, metrics, None)
    run.saver.finish()


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


def _save(run: Run, state: TrainerState, metrics: MetricsLog | None, held_out_loss: float | None) -> None:
    if metrics is not None:
        metrics.sync()
    module = run.student.module
    pieces = {"model": model_pieces(module), "optimizer": optimizer_pieces(module, run.optimizer)}
    run.saver.start(state, pieces, held_out_loss)
