"""Scores choose among the layers that can be kept: no compile is refused after its calibration for the layers it chose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from minitron.compiler.importance.layer_order import MOST_EXCHANGED, choices
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.roles.names import LAYERS
from minitron.compiler.verify.selection import first_mistake
from minitron.compiler.verify.subject import Ranking
from minitron.specs.progress import Silent
from tests.foundry import WITHOUT_PROGRAM, Build, Foundry
from tests.models import COMMON, save_teacher
from tests.zoo.anything import tiny
from tests.zoo.configs import EVERY, config_of


def numbers(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=7), st.integers(1, 6), st.booleans())
def test_choices_come_in_the_order_of_what_they_give_up(values: list[int], keep: int, contiguous: bool) -> None:
    keep = min(keep, len(values) - 1)
    scores = numbers(*values)
    found = list(choices(scores, keep, contiguous=contiguous))
    assert len(set(found)) == len(found) and all(list(one) == sorted(set(one)) and len(one) == keep for one in found)
    exchanged = [len({*found[0]} - {*one}) for one in found]
    kept = [float(scores[list(one)].sum()) for one in found]
    assert kept[0] == max(kept)
    if contiguous:
        assert len(found) == len(values) - (len(values) - keep) + 1 and kept == sorted(kept, reverse=True)
    else:
        assert exchanged == sorted(exchanged) and max(exchanged) <= MOST_EXCHANGED
        for count in range(MOST_EXCHANGED + 1):
            alike = [one for one, other in zip(kept, exchanged, strict=True) if other == count]
            assert alike == sorted(alike, reverse=True)


class Told(Silent):
    """Remembers the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def saved(foundry: Foundry, family: str, **keys: Any) -> Path:
    folder = foundry.root / f"choice-{family}-{len(keys)}"
    if folder.exists():
        return folder
    if keys:
        known = AutoConfig.for_model(family)
        keys = {key: value for key, value in COMMON.items() if hasattr(known, key)} | keys
        return save_teacher(folder, AutoConfig.for_model(family, **keys))
    return save_teacher(folder, config_of(family) if family in EVERY else tiny(family))


def compiled(
    foundry: Foundry, teacher: Path, tmp_path: Path, keep: int, scores: Any, **depth: Any
) -> tuple[Build, list[str]]:
    """A compile whose layers have these scores, with what it told."""
    told = Told()
    stages = replace(WITHOUT_PROGRAM, score=lambda _: (ScoreTable(layers=scores), None))
    data = {"data": foundry.calibration}
    loaded = foundry.load(teacher, {LAYERS: keep}, importance=data | ({"depth": depth} if depth else {}))
    return foundry.compile(loaded, tmp_path / "build", told, stages=stages), told.messages


CONVOLVED = {
    "block_auto_adjust_ff_dim": False, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"],
}  # fmt: skip
CHOICES: list[tuple[str, dict[str, Any], int, Any, dict[str, Any], tuple[int, ...], str]] = [
    # Attention stands in layer 1, and transformers' caches want one such layer.
    (
        "lfm2_moe",
        {},
        2,
        numbers(3, 1, 2),
        {},
        (0, 1),
        "0, 2 score highest and cannot be kept (a student of these widths",
    ),
    ("lfm2", CONVOLVED, 2, numbers(1, 1, 5, 2), {"contiguous": True}, (0, 1), "0, 1 stay"),
    # A bias in the last layer only: it is number 1 of the two that stay.
    ("gpt_neox_japanese", {}, 2, numbers(4, 3, 2, 1), {}, (0, 3), "0, 3 stay"),
    # A constant follows the number of the layer.
    (
        "diffllama",
        {"num_hidden_layers": 4},
        2,
        numbers(1, 2, 3, 4),
        {},
        (0, 1),
        "follows the number); layers 0, 1 stay",
    ),
]


@pytest.mark.parametrize(
    ("family", "keys", "keep", "scores", "depth", "stay", "words"), CHOICES, ids=[f"{c[0]}-{c[2]}" for c in CHOICES]
)
def test_the_highest_scored_layers_that_can_be_kept_stay(
    foundry: Foundry, tmp_path: Path, family: str, keys: dict[str, Any], keep: int, scores: Any, depth: dict[str, Any],
    stay: tuple[int, ...], words: str,
) -> None:  # fmt: skip
    build, messages = compiled(foundry, saved(foundry, family, **keys), tmp_path, keep, scores, **depth)
    assert tuple(build.document("plan.json")["selection"][LAYERS][0]) == stay
    assert all(check["passed"] for check in build.checks.values())
    assert any(words in message for message in messages), messages
    said = [one for one in build.document("plan.json")["remarks"] if "scores choose" in one]
    assert len(said) == 1, "the plan foretells it"


def test_the_plan_says_nothing_of_layers_that_are_alike(foundry: Foundry) -> None:
    plan = foundry.plan(foundry.teacher("llama"), {LAYERS: 2})
    assert not [one for one in plan.remarks if "scores choose" in one]


def test_the_selection_check_knows_which_layers_could_be_kept(foundry: Foundry) -> None:
    plan = foundry.plan(foundry.teacher("llama", num_hidden_layers=4), {LAYERS: 2})
    scores = ScoreTable(layers=numbers(4, 3, 2, 1))

    def mistake(kept: list[int], *impossible: tuple[int, ...], contiguous: bool = False) -> str | None:
        ranking = Ranking(scores, plan.targets, contiguous, False, lambda layers: layers not in impossible)
        return first_mistake({LAYERS: [kept]}, ranking, plan.teacher.roles, 4)

    assert mistake([0, 1]) is None and mistake([0, 2], (0, 1)) is None
    assert mistake([0, 2]) == "num_hidden_layers keeps 2, scored 2, and drops 1, scored 3"
    assert mistake([0, 3], (0, 1)) == "num_hidden_layers keeps [0, 3], and [0, 2] score higher"
    assert mistake([2, 3], (0, 1), contiguous=True) == "num_hidden_layers keeps [2, 3], and [0, 3] score higher"
    assert mistake([0, 3], (0, 1), contiguous=True) is None
    assert "which are not 2 neighbours" in str(mistake([0, 2], contiguous=True))
