"""Measures teacher, pruned student and distilled student side by side: `minitron eval BUILD`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minitron.runtime.benchmarks.catalogue import Found, named
from minitron.runtime.benchmarks.suite import Suite, make_suite, opened
from minitron.runtime.data import Windows
from minitron.runtime.disk import writing
from minitron.runtime.folders import require_own_folders
from minitron.runtime.interrupt import interrupts
from minitron.runtime.measured_model import PROMPT_TOKENS, Instruments, MeasuredModel
from minitron.runtime.measurements import Measurements, check_room
from minitron.runtime.models import model_folder, readable
from minitron.runtime.plan import LoadedPlan, read_training_plan
from minitron.runtime.requirements import judge
from minitron.runtime.setup import held_out_windows
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.verified import require_verified
from minitron.runtime.world import World, join_world, locked
from minitron.specs.atomic import write_text
from minitron.specs.blocks.base import EVALUATED_SEQUENCE
from minitron.specs.builds import CONFIG, CORRECTION, RESULTS
from minitron.specs.cache import tokens_folder
from minitron.specs.errors import placing
from minitron.specs.progress import Progress, Silent
from minitron.specs.search_files import read_ranking, read_search, table
from minitron.specs.training_plan import ModelPlan, TrainingPlan

FORMAT_VERSION = 1


def evaluate(
    build: Path,
    *,
    device: str | None,
    progress: Progress,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    unverified: bool = False,
    outside: bool = False,
) -> dict[str, Any]:
    """Measures every model of BUILD that exists, writes BUILD/results.json and returns its content.

    For each of `teacher`, `corrected_teacher` where there is one, `pruned` and, once trained, `distilled`: parameters,
    bytes of the weights on disk, held-out loss (nats a token) and perplexity, greedy decoding speed (one sequence,
    key-value cache), the tasks of the suite, and a continuation of one prompt. `recovered` is the share of the pruning
    loss that distillation won back: 1 is the loss of the (uncorrected) teacher, 0 that of the pruned student.

    Measurements of the same model with the same data and settings are not repeated; each measurement is stored as soon
    as it is made. A task that fails has an `error` in place of a score. `tasks` are measured instead of the whole
    suite, `limit` is the number of questions of each task; `unverified`, `outside`, UsageError and WorkError are as for
    training.
    """
    loaded = read_training_plan(build)
    suite, shown = _suites(loaded, tasks, limit)
    with (
        placing(loaded),
        interrupts(),
        join_world(device) as world,
        locked(world, "evaluating", loaded.folder),
        opened() as folder,
    ):
        require_own_folders(loaded, outside=outside)
        if not unverified:
            world.from_leader(lambda: require_verified(loaded))
        progress = progress if world.leads else Silent()
        world.from_leader(lambda: check_room(loaded.folder))
        instruments = _instruments(loaded, suite, shown, folder, world, progress)
        results = _results(instruments, _measure_all(instruments, progress))
        if world.leads:
            with writing(str(loaded.folder / RESULTS)):
                write_text(loaded.folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def _suites(loaded: LoadedPlan, tasks: Sequence[str] | None, limit: int | None) -> tuple[Suite, tuple[Found, ...]]:
    """Returns the benchmarks to run, and those of the plan whose earlier results are only shown: all that `tasks` leaves
    out.
    """
    plan = loaded.plan.evaluate
    data_dir = None if plan.data_dir is None else loaded.folder / plan.data_dir
    suite = make_suite(plan.suite if tasks is None else named(plan.suite, tasks), data_dir, limit)
    asked = {found.benchmark.task for found in suite.found}
    shown = [] if tasks is None else [one for one in plan.suite if one.task not in asked]
    return suite, make_suite(shown, data_dir).found


def _instruments(
    loaded: LoadedPlan, suite: Suite, shown: tuple[Found, ...], folder: Path, world: World, progress: Progress
) -> Instruments:
    """Reads what every model of the build is measured with: tokenizer, held-out text, prompt, earlier measurements."""
    encoder = TextEncoder.load(loaded.folder / loaded.plan.tokenizer)
    cache = tokens_folder(loaded.folder, loaded.folder / loaded.plan.work)
    windows = held_out_windows(loaded, _length(loaded), world, encoder, cache, progress)
    prompt = _prompt(loaded.plan.evaluate.prompt, encoder, windows)
    kept = Measurements(loaded.folder, world)
    return Instruments(loaded, encoder, windows, prompt, suite, shown, folder, world, kept)


def _results(instruments: Instruments, measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of results.json, from the results of each model."""
    loaded, plan, prompt = instruments.loaded, instruments.loaded.plan.evaluate, instruments.prompt
    return {
        "format_version": FORMAT_VERSION,
        "name": loaded.plan.name,
        "device": instruments.world.device.type,
        "prompt": None if prompt is None else instruments.encoder.text(prompt),
        "models": measured,
        "recovered": recovered(measured),
        "requirements": judge(plan.require, measured, recovered(measured)),
        "search": searched(loaded.folder),
        "published": None if plan.published is None else plan.published.model_dump(mode="json"),
    }


def searched(build: Path) -> dict[str, Any] | None:
    """Returns the table of the candidates of the search that has chosen this student; None where there was no
    search."""
    file, ranking = read_search(build), read_ranking(build)
    if file is None or ranking is None or ranking.identity != file.identity or ranking.winner is None:
        return None
    return {"winner": ranking.winner, "candidates": table([one.figures for one in file.candidates], ranking)}


def _measure_all(instruments: Instruments, progress: Progress) -> dict[str, Any]:
    """Measures everything that is missing, and returns the results of each model by its name."""
    models = [MeasuredModel(instruments, *of) for of in _models(instruments.loaded)]
    missing = [model.missing() for model in models]
    if count := sum(map(len, missing)):
        with progress.task("evaluate", count, "measurements") as task:
            for model, measurements in zip(models, missing, strict=True):
                model.measure(measurements, progress, task)
    else:
        progress.message("evaluate: everything was measured before")
    measured = {model.name: model.results() for model in models}
    for name, results in measured.items():
        for task_name, score in results["tasks"].items():
            teacher = (measured["teacher"]["tasks"].get(task_name) or {}).get("value")
            if name != "teacher" and score["value"] is not None and teacher:
                score["of_teacher"] = score["value"] / teacher
    return measured


def _models(loaded: LoadedPlan) -> Iterator[tuple[str, Path, ModelPlan]]:
    """Yields name, folder and plan of every model that exists."""
    plan = loaded.plan
    yield "teacher", model_folder(loaded, "teacher", plan.teacher), plan.teacher
    correction = plan.teacher_correction if isinstance(plan, TrainingPlan) else None
    if correction is not None and (loaded.folder / correction.output / CORRECTION).is_file():
        yield "corrected_teacher", loaded.folder / correction.output, plan.teacher
    yield "pruned", model_folder(loaded, "student", plan.student), plan.student
    if (loaded.folder / plan.output / CONFIG).is_file():
        yield "distilled", loaded.folder / plan.output, plan.student


def _length(loaded: LoadedPlan) -> int:
    """Returns the length of a sequence of held-out text."""
    plan = loaded.plan
    if isinstance(plan, TrainingPlan):
        return plan.sequence_length
    return min(EVALUATED_SEQUENCE, readable(model_folder(loaded, "student", plan.student)) or EVALUATED_SEQUENCE)


def _prompt(text: str | None, encoder: TextEncoder, windows: Windows | None) -> list[int] | None:
    """Returns the tokens of the prompt: the plan's text, or the beginning of the held-out text."""
    if text is not None:
        ids = [int(token) for token in encoder.tokenizer(text, add_special_tokens=False).input_ids]
        return [encoder.bos, *ids] if encoder.bos is not None else ids or None
    if windows is None:
        return None
    read, _ = windows.window(0)
    return [int(token) for token in read[:PROMPT_TOKENS]]


def recovered(models: dict[str, Any]) -> float | None:
    """Returns (pruned - distilled) / (pruned - teacher) in held-out loss; None where pruning lost nothing or a loss is
    missing.
    """
    losses: list[float] = []
    for name in ("teacher", "pruned", "distilled"):
        measured = (models.get(name) or {}).get("held_out")
        if measured is None:
            return None
        losses.append(measured["loss"])
    teacher, pruned, distilled = losses
    return (pruned - distilled) / (pruned - teacher) if pruned > teacher else None
