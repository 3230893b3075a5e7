"""The catalogue of tasks, those of lm-evaluation-harness and our own, found by name without loading any data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from minitron.runtime.benchmarks.programs import ALLOWS_CODE, check_confinement, code_is_allowed
from minitron.specs.blocks.benchmarks import Benchmark
from minitron.specs.errors import UsageError
from minitron.specs.suggest import did_you_mean

OURS = Path(__file__).with_name("tasks")
"""Task files in the harness's format, for tasks that the harness lacks."""

_FUNCTIONS = "minitron.runtime.benchmarks.metrics"
_CODE = {"humaneval": "prompt_and_answers", "mbpp": "as_they_are"}
"""The tasks whose programs we run, and how an answer becomes a program. The harness would run the programs in processes
that are not confined, and would fetch code from the Hub to do it.
"""

Document = dict[str, Any]


class Function(str):
    """The dotted name of a function in a task file; the harness imports the function."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def task_file(document: Document) -> str:
    """Writes a task as a YAML file that the harness reads."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Group:
    """A group's own file."""

    name: str
    path: Path


@dataclass(frozen=True)
class Found:
    """One benchmark, and the tasks that it consists of."""

    benchmark: Benchmark
    tasks: tuple[str, ...]
    """The names of the benchmark's tasks: for a group all tasks in it, else the name of the task itself."""

    groups: tuple[Group, ...] = ()
    """The group itself and the groups inside it; empty where the benchmark is not a group."""

    configs: dict[str, Document] = field(default_factory=dict, compare=False)
    """Task -> its configuration with the benchmark's own settings."""

    unsafe: tuple[str, ...] = ()
    """The tasks of the benchmark that run programs written by a model."""


@cache
def _manager() -> Any:
    """Returns the harness's index of all tasks, which takes seconds to build. UsageError where the harness is not
    installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(
            "evaluate.suite needs lm-eval, which is not installed; run: pip install 'minitron[eval]', or write []"
        ) from None
    return TaskManager(include_path=str(OURS))


def find(suite: Sequence[Benchmark]) -> list[Found]:
    """Finds the benchmarks of a suite, in its order; a tag is replaced by its tasks. UsageError for an unknown name,
    and for tasks that run programs written by models where that is not allowed or cannot be done safely.
    """
    found = [one for benchmark in suite for one in _find(benchmark)]
    unsafe = {task: one for one in found for task in one.unsafe}
    if unsafe:
        _check_code(unsafe)
    return found


def _find(benchmark: Benchmark) -> Iterator[Found]:
    index = _manager().task_index
    name = benchmark.task
    if name not in index:
        meant = did_you_mean(name, list(index))
        raise UsageError(f"evaluate.suite: lm-eval has no task `{name}`; {meant}write another, or leave it out")
    entry = index[name]
    if entry.yaml_path is None:  # a tag: a name for several tasks, without a score of its own
        for task in sorted(entry.tags):
            yield from _find(benchmark.model_copy(update={"task": task}))
        return
    tasks: dict[str, Document] = {}
    groups: dict[str, Path] = {}
    _members(name, tasks, groups)
    configs = {task: config(index[task], benchmark) for task in tasks if task in index}
    unsafe = tuple(task for task, own in tasks.items() if own.get("unsafe_code"))
    yield Found(benchmark, tuple(configs), tuple(Group(*one) for one in groups.items()), configs, unsafe)


def _members(member: str | Document, tasks: dict[str, Document], groups: dict[str, Path]) -> None:
    """Adds the tasks and groups at and below a member of a group; the member is a name, or a mapping that changes or
    defines a task or group.
    """
    index = _manager().task_index
    name = member if isinstance(member, str) else str(member.get("group") or member.get("task"))
    entry = index.get(name)
    if entry is None:  # what a group writes out in place keeps all of its own settings
        inside = member.get("task") if isinstance(member, dict) and "group" in member else None
        if inside is None and isinstance(member, dict):
            tasks[name] = member
    elif entry.yaml_path is None:
        inside = sorted(entry.tags)
    elif entry.cfg is not None and "group" in entry.cfg:
        groups[name] = Path(entry.yaml_path)
        inside = entry.cfg.get("task")
    else:
        tasks[name] = entry.cfg or {}
        return
    for one in inside if isinstance(inside, list) else [inside] if inside else []:
        _members(one, tasks, groups)


def subset(task: str) -> str | None:
    """Returns the name of a task's part of its data set, such as `anatomy` of mmlu."""
    name = (_manager().task_index[task].cfg or {}).get("dataset_name")
    return None if name is None else str(name)


def config(entry: Any, benchmark: Benchmark) -> Document:
    """Returns the content of a task's file with the settings of the benchmark: the file includes the task's own file
    and replaces the keys that differ.
    """
    own: Document = entry.cfg or {}
    if entry.name in _CODE:
        document = _with_our_functions(own, benchmark)
    else:
        document = {"include": str(entry.yaml_path), "task": entry.name}
    if benchmark.shots is not None:
        document["num_fewshot"] = benchmark.shots
    if benchmark.samples is not None:
        document["repeats"] = benchmark.samples
    if benchmark.temperature is not None or benchmark.top_p is not None:
        document["generation_kwargs"] = _generation(own, benchmark)
    return document


def _generation(own: Document, benchmark: Benchmark) -> Document:
    settings: Document = deepcopy(own.get("generation_kwargs") or {})
    if benchmark.temperature == 0:
        settings.pop("temperature", None)
        return settings | {"do_sample": False}
    chosen = {"temperature": benchmark.temperature, "top_p": benchmark.top_p}
    return settings | {"do_sample": True} | {key: value for key, value in chosen.items() if value is not None}


def _with_our_functions(own: Document, benchmark: Benchmark) -> Document:
    """Returns a task whose answers are programs, with our functions in place of the harness's."""
    document = {key: value for key, value in deepcopy(own).items() if key not in ("fewshot_config", "include")}
    document["metric_list"] = [
        {"metric": Function(f"{_FUNCTIONS}.pass_at_1"), "aggregation": "mean", "higher_is_better": True}
    ]
    programs = {"function": "custom", "filter_fn": Function(f"{_FUNCTIONS}.{_CODE[document['task']]}")}
    document["filter_list"] = [{"name": "programs", "filter": [programs]}]
    if document.get("num_fewshot") if benchmark.shots is None else benchmark.shots:
        document["fewshot_config"] = {
            "sampler": "first_n",
            "split": "prompt",
            "process_docs": Function(f"{_FUNCTIONS}.solved_examples"),
        }
    return document


def _check_code(unsafe: dict[str, Found]) -> None:
    for task, found in unsafe.items():
        name = f"`{task}`" if found.benchmark.task == task else f"`{task}`, a part of `{found.benchmark.task}`,"
        if not code_is_allowed():
            raise UsageError(
                f"evaluate.suite: {name} runs the programs that the models write; set {ALLOWS_CODE}=1 in the environment "
                "to allow it, best in a container, or leave it out"
            )
        if task not in _CODE:
            raise UsageError(
                f"evaluate.suite: {name} runs the programs that the models write, and only those of {' and '.join(_CODE)} can "
                "be confined; leave it out"
            )
    check_confinement()


def named(suite: Sequence[Benchmark], names: Sequence[str]) -> tuple[Benchmark, ...]:
    """Returns the benchmarks that a user asks for by name: those of the suite with the suite's settings, others with
    the task's own settings.
    """
    known = {one.task: one for one in suite}
    return tuple(known.get(name) or Benchmark(task=name) for name in dict.fromkeys(names))
