"""Benchmarks of lm-evaluation-harness, run by it and never by code of ours."""

from __future__ import annotations

from typing import Any

from minitron.runtime.models import LanguageModel, Tokenizer
from minitron.runtime.plan import EvaluatePlan
from minitron.specs.errors import UsageError, WorkError


def check_suite(plan: EvaluatePlan) -> None:
    """UsageError, before anything long begins, for a suite that cannot be run here."""
    if not plan.suite:
        return
    if plan.data_dir is not None:
        raise UsageError(
            "evaluate.data_dir is not available in this version; write null, and the tasks' data comes from the Hub"
        )
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError:
        raise UsageError(
            "evaluate.suite needs lm-eval, which is not installed; run: pip install 'minitron[eval]', or write []"
        ) from None


def run_suite(model: LanguageModel, tokenizer: Tokenizer, plan: EvaluatePlan, batch_size: int) -> dict[str, Any]:
    """Each task's main figure: `{task: {metric, value, stderr}}`. WorkError where a task cannot be run."""
    if not plan.suite:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        harness = HFLM(pretrained=model.module, tokenizer=tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(model=harness, tasks=list(plan.suite), verbosity="ERROR")
    except Exception as error:  # tasks load data from anywhere and fail in their own ways
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WorkError(
            f"lm-eval could not run {', '.join(plan.suite)} ({reason}); check the names and the network"
        ) from None
    return {task: main_figure(figures) for task, figures in results["results"].items()}


def main_figure(figures: dict[str, Any]) -> dict[str, Any]:
    """The figure that a task is quoted by: length-normalised accuracy where it has one, else the first that it
    reports."""
    named = {key.split(",")[0]: value for key, value in figures.items() if isinstance(value, int | float)}
    metrics = [name for name in named if not name.endswith("_stderr") and name not in ("alias", "sample_len")]
    if not metrics:
        return {"metric": None, "value": None, "stderr": None}
    metric = "acc_norm" if "acc_norm" in metrics else metrics[0]
    return {"metric": metric, "value": named[metric], "stderr": named.get(f"{metric}_stderr")}
