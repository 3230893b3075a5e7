"""Benchmarks of lm-evaluation-harness, run by it and never by code of ours."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.runtime.local_tasks import check_local_data, write_tasks
from minitron.runtime.models import LanguageModel, Tokenizer
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.suggest import closest
from minitron.specs.training_plan import EvaluatePlan

_ALLOWS_CODE = "HF_ALLOW_CODE_EVAL"
"""The libraries' own switch for tasks that run what a model writes."""


def check_suite(plan: EvaluatePlan, folder: Path) -> None:
    """UsageError, before anything long begins, for a suite that cannot be run here. `folder` is what `data_dir` is
    relative to."""
    if not plan.suite:
        return
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(
            "evaluate.suite needs lm-eval, which is not installed; run: pip install 'minitron[eval]', or write []"
        ) from None
    manager = TaskManager()
    for task in plan.suite:
        if task not in manager.all_tasks:
            nearest = closest(task, manager.all_tasks)
            meant = f"did you mean `{nearest}`? " if nearest else ""
            raise UsageError(f"evaluate.suite: lm-eval has no task `{task}`; {meant}write another, or leave it out")
        if plan.data_dir is not None and task not in manager.all_subtasks:
            raise UsageError(
                f"evaluate.suite: `{task}` is a group of tasks, and their data cannot come from evaluate.data_dir; name the "
                "tasks themselves, or write null for data_dir"
            )
        if not _code_is_allowed() and _runs_code(Path(manager.task_index[task].yaml_path or "")):
            raise UsageError(
                f"evaluate.suite: `{task}` runs the programs that the models write; set {_ALLOWS_CODE}=1 in the environment "
                "to allow it, best in a container, or leave it out"
            )
    if plan.data_dir is not None:
        check_local_data(folder / plan.data_dir, plan.suite)


def _code_is_allowed() -> bool:
    return os.environ.get(_ALLOWS_CODE) == "1"


def _runs_code(task: Path) -> bool:
    """Whether a task's file, or one that it includes, says so. Not by loading it: that fetches what the task needs."""
    try:
        lines = task.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    included = (line.removeprefix("include:").strip() for line in lines if line.startswith("include:"))
    return "unsafe_code: true" in lines or any(_runs_code(task.parent / name) for name in included)


def run_suite(
    model: LanguageModel, tokenizer: Tokenizer, plan: EvaluatePlan, folder: Path, batch_size: int
) -> dict[str, Any]:
    """Each task's main figure: `{task: {metric, value, stderr}}`. WorkError where a task cannot be run."""
    if not plan.suite:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _task_manager(plan, folder) as manager:
        try:
            harness = HFLM(pretrained=model.module, tokenizer=tokenizer, batch_size=batch_size)
            results = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(plan.suite),
                task_manager=manager,
                confirm_run_unsafe_code=_code_is_allowed(),
            )
        except WorkError:
            raise
        except Exception as error:  # tasks load data from anywhere and fail in their own ways
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise WorkError(
                f"lm-eval could not run {', '.join(plan.suite)} ({reason}); check the network, from where tasks fetch what "
                "they need"
            ) from None
    return {task: main_figure(figures) for task, figures in results["results"].items()}


@contextmanager
def _task_manager(plan: EvaluatePlan, folder: Path) -> Iterator[Any]:
    """The harness's tasks; with `data_dir` those of the suite read that folder's files."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if plan.data_dir is None:
        yield manager
        return
    with tempfile.TemporaryDirectory(prefix="minitron-tasks-") as made:
        own = {task: Path(manager.task_index[task].yaml_path) for task in plan.suite}
        write_tasks(folder / plan.data_dir, own, Path(made))
        yield TaskManager(include_path=made)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's notices about how it is called; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main_figure(figures: dict[str, Any]) -> dict[str, Any]:
    """The figure that a task is quoted by: length-normalised accuracy where it has one, else the first that it
    reports."""
    named = {key.split(",")[0]: value for key, value in figures.items() if isinstance(value, int | float)}
    metrics = [name for name in named if not name.endswith("_stderr") and name not in ("alias", "sample_len")]
    if not metrics:
        return {"metric": None, "value": None, "stderr": None}
    metric = "acc_norm" if "acc_norm" in metrics else metrics[0]
    return {"metric": metric, "value": named[metric], "stderr": named.get(f"{metric}_stderr")}
