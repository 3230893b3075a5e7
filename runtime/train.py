"""`minitron train BUILD`: the student learns from the teacher what training.yaml says, and nothing of it is ever
lost."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.checkpoint import TrainerState
from minitron.runtime.correction import (
    WEIGHTS,
    Correction,
    correction_of,
    record,
    weights_digest,
    with_corrected_teacher,
)
from minitron.runtime.data import Data, data_hash
from minitron.runtime.disk import writing
from minitron.runtime.held_out import HeldOut, held_out
from minitron.runtime.hidden_states import remove_projection
from minitron.runtime.interrupt import Interrupt, interrupts
from minitron.runtime.metrics import MetricsLog, read_metrics
from minitron.runtime.models import DTYPES, model_folder
from minitron.runtime.output import Weights, whole_weights, write_model
from minitron.runtime.pieces import model_pieces, optimizer_pieces
from minitron.runtime.plan import LoadedPlan, TrainingPlan, read_plan, resume_identity
from minitron.runtime.setup import Run, needs_teacher, prepare, require_same_training, resume
from minitron.runtime.step import train_step
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.utilisation import peak_flops, peak_memory, utilisation
from minitron.runtime.world import World, join_world
from minitron.specs.atomic import remove_leftovers, write_text
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress, Silent

FINISHED = "finished.json"
METRICS = "metrics.jsonl"
LOCK = "lock"
SHOWN = ("loss", "held_out_loss", "lr", "mfu", "memory_bytes")
"""What a user sees while it runs, beside tokens, their rate and the time left."""


def train(build: Path, *, device: str | None, progress: Progress) -> None:
    """Trains what BUILD/training.yaml says and writes BUILD/model. Goes on from the last checkpoint where there is
    one, and does nothing where training is finished.

    UsageError (SpecInvalid with the place) for a plan that is wrong, or not that of the training that is under way;
    WorkError for broken files, a full disk, a loss that is not finite; KeyboardInterrupt after SIGINT or SIGTERM, a
    checkpoint written.
    """
    loaded = read_plan(build)
    plan = loaded.training()
    work, output = loaded.folder / plan.work, loaded.folder / plan.output
    with (
        interrupts() as interrupt,
        join_world(device) as world,
        only_one(work, "training", active=world.leads, file=LOCK),
    ):
        progress = progress if world.leads else Silent()
        _require_one_folder(work, world)
        if world.leads:
            _remove_leftovers(work, output)
        encoder = TextEncoder.load(loaded.folder / plan.tokenizer)
        data = world.from_leader(lambda: Data.read(loaded.data("data", plan.data)))
        identity = resume_identity(plan, data_hash(data, encoder, plan.tokens))
        if (work / FINISHED).is_file() and output.is_dir():
            require_same_training(
                loaded, json.loads((work / FINISHED).read_text(encoding="utf-8"))["identity"], identity
            )
            progress.message(f"already trained: {output}; delete {work} to train from the beginning")
            return
        if plan.teacher_correction is not None and (before := _identity_of_newest(work / "checkpoints")) is not None:
            require_same_training(loaded, before, identity)  # before a teacher is corrected for nothing
        if plan.teacher_logits == "online":  # else it was corrected, if it was, before it was captured
            loaded = corrected(loaded, data, world, encoder, interrupt, progress)
        identity |= _teacher_weights(loaded, plan)
        run = prepare(loaded, loaded.training(), data, world, encoder, identity, work / "data", progress)
        state = resume(loaded, run, progress)
        with interrupt.deferring():
            _learn(run, state, interrupt, progress)
        remove_projection(run.student)
        weights = whole_weights(run.student, DTYPES[plan.student.dtype], world)
        world.from_leader(lambda: _finish(loaded, run, weights))
        progress.message(f"trained: {output}")


def corrected(
    loaded: LoadedPlan, data: Data, world: World, encoder: TextEncoder, interrupt: Interrupt, progress: Progress
) -> LoadedPlan:
    """The plan with the corrected teacher as its teacher, which is trained first where it is not there yet; the plan
    itself where it asks for no correction. Goes on, is interrupted and fails as `train` does."""
    plan = loaded.training()
    correction = correction_of(loaded, data_hash(data, encoder, plan.tokens))
    if correction is None:
        return loaded
    if not correction.done():
        world.from_leader(lambda: correction.begin(progress))
        cache = loaded.folder / plan.work / "data"
        run = prepare(correction.loaded, correction.plan, data, world, encoder, correction.identity, cache, progress)
        state = resume(correction.loaded, run, progress)
        if state.step == 0 and run.held_out is not None:
            before = _measure_held_out(run).loss
            world.from_leader(lambda: correction.remember(before))
        with interrupt.deferring():
            _learn(run, state, interrupt, progress, "correct teacher")
        weights = whole_weights(run.student, DTYPES[run.plan.student.dtype], world)
        world.from_leader(lambda: _finish_correction(correction, run, weights, progress))
        # Hooks and modules hold each other: without this the memory of this training is still taken in the next.
        del run, weights
        gc.collect()
    return with_corrected_teacher(loaded, correction)


def _finish_correction(correction: Correction, run: Run, weights: Weights, progress: Progress) -> None:
    lines = [line for line in read_metrics(run.work / METRICS) if "held_out_loss" in line]
    before, after = correction.before(), lines[-1]["held_out_loss"] if lines else None
    plan = correction.plan
    files = record(correction, before, after)
    write_model(run.student, weights, correction.source, correction.output, plan.name, [], files)
    measured = "" if before is None or after is None else f": held-out loss {before:.4f} before, {after:.4f} after"
    progress.message(f"corrected the teacher{measured}")


def _teacher_weights(loaded: LoadedPlan, plan: TrainingPlan) -> dict[str, str]:
    """Which teacher a training learns from beside it: `layout` and folders may change on the way, the teacher may not.
    (Stored samples know theirs themselves, and so does a corrected teacher.)"""
    if plan.teacher_logits != "online" or plan.teacher_correction is not None or not needs_teacher(plan):
        return {}
    return {WEIGHTS: weights_digest(model_folder(loaded, "teacher", plan.teacher))}


def _identity_of_newest(checkpoints: Path) -> dict[str, Any] | None:
    """What the newest checkpoint remembers of its plan, its weights not looked at."""
    for state in sorted(checkpoints.glob("step-*/state.json"), reverse=True):
        try:
            return dict(json.loads(state.read_text(encoding="utf-8"))["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _require_one_folder(work: Path, world: World) -> None:
    """UsageError where some rank does not see what the leader writes: its part of a checkpoint would be lost."""
    world.wait()
    if world.any(not (work / LOCK).is_file()):
        raise UsageError(
            f"{work} is not the same folder on all machines; put the build on a file system that they share"
        )


def _remove_leftovers(work: Path, output: Path) -> None:
    """What processes left that were killed while they wrote data or the model."""
    remove_leftovers(work / "data")
    for folder in output.parent.glob(f".{output.name}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _learn(run: Run, state: TrainerState, interrupt: Interrupt, progress: Progress, name: str = "train") -> None:
    """Step after step until all tokens are learnt; held-out loss and checkpoints each so many tokens and at the end.

    What is measured and saved when depends on the tokens alone, so a training that was killed is the same training.
    """
    plan, world = run.plan, run.world
    peak = peak_flops(world.device, run.compute_dtype)
    measure_every = plan.held_out.every_tokens if plan.held_out is not None else None
    with (
        torch.random.fork_rng([world.device] if world.device.type == "cuda" else []),
        _metrics(run, state, progress) as metrics,
        progress.task(name, plan.steps * plan.step_tokens, "tokens", done=state.tokens) as task,
    ):
        while state.step < plan.steps:
            start, before = time.perf_counter(), state
            try:
                figures = train_step(run, before)
            except WorkError:  # what all ranks saw together: the checkpoint that is being written is worth having
                run.saver.finish()
                raise
            state = run.state_after(before.samples + plan.global_batch_size)
            rate = plan.step_tokens / (time.perf_counter() - start)
            line = {"step": state.step, "tokens": state.tokens, **figures, "tokens_per_second": round(rate, 1)}
            line["memory_bytes"] = peak_memory(world.device)
            if (mfu := utilisation(run.flops_per_token, rate, peak, world.size)) is not None:
                line["mfu"] = round(mfu, 4)
            last = state.step == plan.steps
            if run.held_out is not None and (last or _crosses(before, state, measure_every)):
                result = _measure_held_out(run)
                line |= {"held_out_loss": result.loss, "held_out_perplexity": result.perplexity}
            broken = _write(metrics, line)
            task.advance(plan.step_tokens, **{key: line[key] for key in SHOWN if key in line})
            stop, writing, failed, unwritten = world.any_of(
                interrupt.requested, *run.saver.status(), broken is not None
            )
            if unwritten:
                run.saver.finish()
                world.from_leader(lambda error=broken: _complain(error))  # type: ignore[misc]
            run.saver.settle(writing=writing, failed=failed)
            if last or stop or _crosses(before, state, plan.checkpoint.every_tokens):
                _save(run, state, metrics, line.get("held_out_loss"))
            if last or stop:
                run.saver.finish()
            if stop and not last:
                progress.message(f"interrupted after step {state.step}; train again to go on from there")
                raise KeyboardInterrupt


def _write(metrics: MetricsLog | None, line: Mapping[str, float]) -> WorkError | None:
    """A line of the metrics, on the rank that writes them. What went wrong is for all ranks to stop for, and not for this one
    alone, which the others would wait for."""
    try:
        if metrics is not None:
            metrics.write(line)
    except WorkError as error:
        return error
    return None


def _complain(error: WorkError | None) -> None:
    if error is not None:
        raise error


def _measure_held_out(run: Run) -> HeldOut:
    assert run.held_out is not None
    return held_out(
        run.student,
        run.held_out,
        run.world,
        batch_size=run.plan.micro_batch_size,
        compute_dtype=run.compute_dtype,
    )


def _crosses(before: TrainerState, after: TrainerState, every: int | None) -> bool:
    """Whether a multiple of `every` tokens lies between two states."""
    return every is not None and before.tokens // every < after.tokens // every


@contextmanager
def _metrics(run: Run, state: TrainerState, progress: Progress) -> Iterator[MetricsLog | None]:
    """The log, on the rank that writes."""
    opened: list[MetricsLog] = []

    def open_log() -> None:
        with writing(str(run.work / METRICS)):
            opened.append(MetricsLog(run.work, state.step, progress))

    run.world.from_leader(open_log)
    if not opened:
        yield None
        return
    with opened[0] as log:
        yield log


def _save(run: Run, state: TrainerState, metrics: MetricsLog | None, held_out_loss: float | None) -> None:
    if metrics is not None:
        metrics.sync()
    module = run.student.module
    pieces = {"model": model_pieces(module), "optimizer": optimizer_pieces(module, run.optimizer)}
    run.saver.start(state, pieces, held_out_loss)


def _finish(loaded: LoadedPlan, run: Run, weights: Weights) -> None:
    """The final model, and the note that this training is done."""
    plan = run.plan
    loss = f"{plan.loss.logits.divergence} to the teacher with weight {plan.loss.logits.weight:g}"
    if plan.loss.cross_entropy:
        loss += f", cross-entropy with weight {plan.loss.cross_entropy:g}"
    if run.hidden is not None:
        loss += f", {run.hidden.settings.distance} distance of hidden states"
    report = [f"Trained on {plan.steps * plan.step_tokens:,} tokens: {loss}."]
    if lines := [line for line in read_metrics(run.work / METRICS) if "held_out_loss" in line]:
        report.append(f"Loss on held-out text: {lines[-1]['held_out_loss']:.4f} nats a token.")
    source = model_folder(loaded, "student", plan.student)
    write_model(run.student, weights, source, loaded.folder / plan.output, plan.name, report)
    write_text(run.work / FINISHED, json.dumps({"format_version": 1, "identity": run.identity}, indent=1) + "\n")
