"""Runs benchmarks with lm-evaluation-harness, which prompts, asks and scores; never with metrics of our own for its tasks."""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.benchmarks.catalogue import Found, find, task_file
from minitron.runtime.benchmarks.local_data import LocalData, check_local_data, data_hash
from minitron.runtime.benchmarks.programs import code_is_allowed
from minitron.runtime.generate import plain_generation
from minitron.runtime.models import LanguageModel, Tokenizer, quiet
from minitron.runtime.world import World
from minitron.specs.blocks.benchmarks import Benchmark
from minitron.specs.errors import WorkError, first_line

_ANSWER_TOKENS = 256
"""What the harness lets an answer have where its task says nothing."""

_SEED = 1234
"""Of the examples that are shown and of answers that are drawn: the harness's own default."""

Score = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Benchmarks that can be run here, and where their data comes from."""

    found: tuple[Found, ...]
    data_dir: Path | None
    limit: int | None
    """Questions of each task; None: all."""

    def identity(self, found: Found, *, limited: bool = True) -> dict[str, Any]:
        """What a benchmark's score depends on beside the model."""
        return {
            "benchmark": found.benchmark.model_dump(mode="json"),
            "limit": self.limit if limited else None,
            "data": None if self.data_dir is None else data_hash(self.data_dir, found),
            "lm_eval": metadata.version("lm_eval"),
        }


def make_suite(benchmarks: Sequence[Benchmark], data_dir: Path | None, limit: int | None = None) -> Suite:
    """UsageError, before anything long begins, for benchmarks that cannot be run here."""
    found = tuple(find(benchmarks)) if benchmarks else ()
    if found and data_dir is not None:
        check_local_data(data_dir, found)
    return Suite(found, data_dir, limit)


@contextmanager
def opened() -> Iterator[Path]:
    """A folder for the files of the tasks and of the data that they read, which goes when it is left."""
    with tempfile.TemporaryDirectory(prefix="minitron-tasks-") as made:
        yield Path(made)


class Unfinished(WorkError):
    """One of several processes failed amid what they do together: none of them can go on."""


def run(
    suite: Suite, found: Found, folder: Path, model: LanguageModel, tokenizer: Tokenizer, world: World, batch_size: int
) -> Score:
    """One benchmark's score for a model, on all ranks: `{metric, value, stderr, shots, questions, ...}`. WorkError where it
    cannot be run."""
    with _quiet():
        tasks = load_tasks(suite, found, folder, world)
        shortened = {name: _leave_room(task, model.positions) for name, task in tasks["tasks"].items()}
        try:
            results = _evaluate(tasks, suite.limit, model, tokenizer, world, batch_size)
        except Exception as error:
            kind = WorkError if world.size == 1 else Unfinished
            raise kind(f"lm-eval could not run {found.benchmark.task} ({first_line(error)})") from error
    score = world.from_leader(lambda: _score(found, results, tasks))
    extra = {"limit": suite.limit, "max_answer_tokens": max((one for one in shortened.values() if one), default=None)}
    return score | {key: value for key, value in extra.items() if value is not None}


def load_tasks(suite: Suite, found: Found, folder: Path, world: World) -> Any:
    """The harness's own objects for a benchmark, with its data: `{tasks, groups, group_map}`. WorkError on all ranks where that
    fails on one."""
    loaded, failure = None, None
    try:
        loaded = _load(suite, found, folder)
    except Exception as error:  # tasks load data from anywhere and fail in their own ways
        failure = error
    if world.any(failure is not None):
        if isinstance(failure, WorkError):
            raise failure
        reason = "another process could not load it" if failure is None else first_line(failure)
        advice = "; check the network, from where tasks fetch what they need" if suite.data_dir is None else ""
        raise WorkError(f"lm-eval could not load {found.benchmark.task} ({reason}){advice}") from failure
    return loaded


def _load(suite: Suite, found: Found, folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    name = found.benchmark.task
    target = folder / name
    if not target.is_dir():
        try:
            _write_files(suite, found, target)
        except Exception:
            shutil.rmtree(target)  # the next model is told the same, and not of files that are missing
            raise
    loaded = TaskManager(include_path=str(target), include_defaults=False).load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
        wanted = found.benchmark.metric
        if wanted is not None and wanted not in (known := reported(task)):
            raise WorkError(
                f"{task.config.task} reports {', '.join(known)} and no {wanted}; write one of these as `metric`"
            )
    return loaded


def _write_files(suite: Suite, found: Found, target: Path) -> None:
    """Writes the files of a benchmark's tasks and groups, and of their data, into the new folder `target`."""
    target.mkdir()
    data = None if suite.data_dir is None else LocalData(suite.data_dir, target)
    for task in found.tasks:
        document = found.configs[task]
        if data is not None:
            document = document | data.place(found, task, shots=document.get("num_fewshot") or 0)
        (target / f"{task}.yaml").write_text(task_file(document), encoding="utf-8")
    for group in found.groups:
        (target / f"group {group.name}.yaml").write_text(task_file({"include": str(group.path)}), encoding="utf-8")


def reported(task: Any) -> list[str]:
    """The metrics that a task reports; a `pass_at_1` does so as `pass@1`."""
    return [name.replace("pass_at_", "pass@") for name in task.aggregation()]


def _leave_room(task: Any, positions: int | None) -> int | None:
    """Lets no answer be longer than half of what the model can read: the question has to fit in as well. The tokens that are
    left for it, where that is fewer than the task asks for."""
    if positions is None or task.config.output_type != "generate_until":
        return None
    settings = dict(task.config.generation_kwargs or {})
    if int(settings.get("max_gen_toks") or _ANSWER_TOKENS) <= positions // 2:
        return None
    task.set_config(key="generation_kwargs", value=settings | {"max_gen_toks": positions // 2})
    return positions // 2


def _evaluate(
    tasks: Any, limit: int | None, model: LanguageModel, tokenizer: Tokenizer, world: World, batch_size: int
) -> Any:
    """The harness's results at the leader, None at the others."""
    import lm_eval

    from minitron.runtime.benchmarks.harness import Harness

    random.seed(_SEED)
    torch.manual_seed(_SEED + world.rank)
    fewest = min(len(task.eval_docs) for task in tasks["tasks"].values())
    if min(fewest, limit or fewest) < world.size:  # the harness wants a question for each rank: all of them answer all
        world = World(0, 1, world.device)
    with plain_generation(model):
        harness = Harness(model, tokenizer, world, batch_size)
        return lm_eval.evaluate(
            lm=harness, task_dict=tasks, limit=limit, log_samples=False, confirm_run_unsafe_code=code_is_allowed()
        )


def _score(found: Found, results: Any, tasks: Any) -> Score:
    name, benchmark = found.benchmark.task, found.benchmark
    score = main_figure(results["results"].get(name, {}), benchmark.metric)
    if score["value"] is None:
        raise WorkError(f"{name} has no figure of its own; name its tasks: {', '.join(found.tasks)}")
    shots = {task.get_config("num_fewshot") for task in tasks["tasks"].values()}
    score["shots"] = shots.pop() if len(shots) == 1 else None
    score["questions"] = sum(one["effective"] for one in results["n-samples"].values())
    return score if benchmark.samples is None else score | {"samples": benchmark.samples}


def main_figure(figures: dict[str, Any], metric: str | None = None) -> Score:
    """The figure that a task is quoted by: `metric`, or length-normalised accuracy where it has one, else the first that it
    reports. Where an answer is read in several ways, the first of them counts: gsm8k's strict match."""
    named: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, int | float):
            named.setdefault(key.split(",")[0], float(value))  # numpy's own kinds are no JSON
    metrics = [
        name for name in named if not name.endswith("_stderr") and name not in ("alias", "sample_len", "sample_count")
    ]
    chosen = metric or ("acc_norm" if "acc_norm" in metrics else next(iter(metrics), None))
    return {"metric": chosen, "value": named.get(str(chosen)), "stderr": named.get(f"{chosen}_stderr")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices of the libraries and without their bars: progress is ours to show."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars, tqdm = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    try:
        with quiet():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        lm_eval.api.task.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
