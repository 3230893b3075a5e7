"""Runs benchmarks with lm-evaluation-harness, which builds the prompts, asks the model and scores; its tasks never get
metrics of our own.
"""

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
"""The harness's limit of an answer where its task states none."""

_SEED = 1234
"""The seed of the few-shot examples and of sampled answers: the harness's own default."""

Score = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """The benchmarks that can be run here, and the folder of their data."""

    found: tuple[Found, ...]
    data_dir: Path | None
    limit: int | None
    """The number of questions of each task; None stands for all."""

    def identity(self, found: Found, *, limited: bool = True) -> dict[str, Any]:
        """Returns everything but the model that a benchmark's score depends on."""
        return {
            "benchmark": found.benchmark.model_dump(mode="json"),
            "limit": self.limit if limited else None,
            "data": None if self.data_dir is None else data_hash(self.data_dir, found),
            "lm_eval": metadata.version("lm_eval"),
        }


def make_suite(benchmarks: Sequence[Benchmark], data_dir: Path | None, limit: int | None = None) -> Suite:
    """Checks and collects the benchmarks of a plan. UsageError, before any long work begins, for benchmarks that cannot
    be run here.
    """
    found = tuple(find(benchmarks)) if benchmarks else ()
    if found and data_dir is not None:
        check_local_data(data_dir, found)
    return Suite(found, data_dir, limit)


@contextmanager
def opened() -> Iterator[Path]:
    """Yields a folder for the files of the tasks and their data; the folder is removed at the end of the context."""
    with tempfile.TemporaryDirectory(prefix="minitron-tasks-") as made:
        yield Path(made)


class Unfinished(WorkError):
    """The failure of one of several processes in the middle of joint work: none of the processes can go on."""


def run(
    suite: Suite, found: Found, folder: Path, model: LanguageModel, tokenizer: Tokenizer, world: World, batch_size: int
) -> Score:
    """Runs one benchmark for a model, on all ranks, and returns its score: `{metric, value, stderr, shots, questions,
    ...}`. WorkError where the benchmark cannot be run.
    """
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
    """Loads the harness's own objects for a benchmark, with its data: `{tasks, groups, group_map}`. WorkError on all
    ranks where loading fails on one.
    """
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
    """Returns the metrics that a task reports; a `pass_at_1` is reported as `pass@1`."""
    return [name.replace("pass_at_", "pass@") for name in task.aggregation()]


def _leave_room(task: Any, positions: int | None) -> int | None:
    """Limits answers to half of the model's context, so that the question fits in as well. Returns the limit in tokens
    where it is lower than the task's own; else None.
    """
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
    """Evaluates tasks and returns the harness's results on the leader, None on the other ranks."""
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
    """Returns the figure that a task is quoted by: `metric`, or length-normalised accuracy where the task has one, else
    the first that the task reports. Where an answer is read in several ways, the first way counts: gsm8k's strict
    match.
    """
    named: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, int | float):
            named.setdefault(key.split(",")[0], float(value))  # JSON cannot hold numpy's own kinds
    metrics = [
        name for name in named if not name.endswith("_stderr") and name not in ("alias", "sample_len", "sample_count")
    ]
    chosen = metric or ("acc_norm" if "acc_norm" in metrics else next(iter(metrics), None))
    return {"metric": chosen, "value": named.get(str(chosen)), "stderr": named.get(f"{chosen}_stderr")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the notices and progress bars of the libraries: progress is shown by us."""
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
