"""Compares results with the requirements of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron.specs.blocks.requirements import HELD_OUT_LOSS, RECOVERED, read_bound

Judgement = dict[str, Any]


def judge(require: Mapping[str, str], models: Mapping[str, Any], recovered: float | None) -> list[Judgement]:
    """Judges each requirement: `{name, bound, model, value, limit, ok, short_by}`. Requirements apply to the distilled
    student, or to the pruned one where there is no other; a figure that was not measured does not pass.
    """
    model = "distilled" if "distilled" in models else "pruned"
    judged = []
    for name, text in require.items():
        bound = read_bound(text)
        assert bound is not None, "the plan was checked when it was read"
        value = recovered if name == RECOVERED else figure(models, model, name)
        limit = bound.limit(None if bound.of is None else figure(models, bound.of, name))
        short = None if value is None or limit is None else bound.shortfall(value, limit)
        judged.append(
            {
                "name": name, "bound": text, "model": model, "value": value, "limit": limit, "ok": short == 0,
                "short_by": short,
            }
        )  # fmt: skip
    return judged


def figure(models: Mapping[str, Any], model: str, name: str) -> float | None:
    """Returns the held-out loss of a model, or its score in a task; None where there is none."""
    measured = models.get(model) or {}
    if name == HELD_OUT_LOSS:
        return (measured.get("held_out") or {}).get("loss")
    return ((measured.get("tasks") or {}).get(name) or {}).get("value")
