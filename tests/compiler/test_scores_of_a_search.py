"""The candidates of a search share one calibration, whatever each of them narrows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.compiler import make_search, write_search
from minitron.compiler.compile import Stages
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.select import Selection
from minitron.compiler.plan.plan import Plan
from minitron.specs.progress import Silent
from tests.compiler.test_search import search_blocks
from tests.foundry import Foundry


@pytest.mark.parametrize(
    "student",
    [
        {"num_hidden_layers": [3, 2], "num_experts": [6, 4]},  # the first candidate drops one layer, others two
        {"num_hidden_layers": 3, "hidden_size": [32, 24], "num_experts": [6, 3]},  # the first one keeps all experts
    ],
)
def test_all_candidates_find_what_they_need_in_it(foundry: Foundry, tmp_path: Path, student: dict[str, Any]) -> None:
    """Some keep all experts, the others merge some; layers go one after the other, and each drops what went first."""
    seen: list[tuple[Plan, ScoreTable, Selection]] = []

    def select(plan: Plan, scores: ScoreTable) -> Selection:
        selection = Stages().select(plan, scores)
        seen.append((plan, scores, selection))
        return selection

    blocks: dict[str, Any] = search_blocks(foundry, {"budget": {"memory": "100MB"}, "candidates": 4})
    blocks["importance"] = {"data": foundry.calibration, "depth": {"metric": "loss", "greedy": True}}
    teacher = foundry.teacher("qwen3_moe", num_hidden_layers=4)
    loaded = foundry.load(teacher, student, recovery={"merge_experts": True}, **blocks)
    with foundry.shortened():
        found = make_search(loaded, build=tmp_path, weights=True)
        write_search(found, device="cpu", progress=Silent(), stages=replace(Stages(), select=select))
    assert {plan.merges_experts for plan, *_ in seen} == {True, False}
    most = 4 - min(plan.targets.layers for plan, *_ in seen)
    for plan, scores, selection in seen:
        assert scores.layers is not None and sorted(scores.layers) == sorted([*range(most), *[most] * (4 - most)])
        assert list(selection.layers) == np.flatnonzero(scores.layers >= 4 - plan.targets.layers).tolist()
