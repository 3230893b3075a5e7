"""`importance.depth.greedy`: layers go one after the other, and what is left is scored anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler.importance.layer_elimination import LayerElimination
from minitron.compiler.importance.rounds_file import Rounds
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.plan.plan import Plan
from minitron.specs.builds import PARTIAL_ROUNDS
from minitron.specs.errors import SpecInvalid
from minitron.specs.progress import Silent
from tests.foundry import Foundry, executor_of, logits, teacher_model, token_ids

SAMPLES = token_ids(4, 24)


def model_without(plan: Plan, dropped: set[int]) -> Any:
    model = copy.deepcopy(teacher_model(plan))
    model.model.layers = torch.nn.ModuleList(one for i, one in enumerate(model.model.layers) if i not in dropped)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kind for i, kind in enumerate(kinds) if i not in dropped]
    model.config.num_hidden_layers -= len(dropped)
    return model


def harm(plan: Plan, metric: str, dropped: set[int]) -> float:
    got, whole = logits(model_without(plan, dropped), SAMPLES), logits(teacher_model(plan), SAMPLES)
    if metric == "logit_mse":
        return float((got - whole).square().mean())
    return float(torch.nn.functional.cross_entropy(got[:, :-1].flatten(0, 1), SAMPLES[:, 1:].flatten()))


@pytest.mark.parametrize(("family", "metric"), [("llama", "loss"), ("gemma2", "logit_mse")])
def test_each_round_drops_what_harms_least_beside_those_that_are_gone(
    foundry: Foundry, family: str, metric: Any
) -> None:
    """Against models of transformers that lack the layers."""
    plan = foundry.whole(family, num_hidden_layers=4)
    elimination = LayerElimination(plan.teacher, partial(executor_of, plan), SAMPLES, metric)
    scores = elimination.scores(2, Silent())
    gone: set[int] = set()
    for step in range(2):
        harms = {layer: harm(plan, metric, {*gone, layer}) for layer in range(4) if layer not in gone}
        least = min(harms, key=lambda layer: harms[layer])
        assert scores[least] == step, (harms, scores)
        gone.add(least)
    assert sorted(scores) == [0, 1, 2, 2]


@pytest.mark.parametrize("metric", ["loss", "logit_mse"])
def test_one_layer_less_is_what_one_ranking_drops(foundry: Foundry, metric: str) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=4)
    kept = [
        foundry.build(
            teacher, {"num_hidden_layers": 3}, program=False,
            importance={"data": foundry.calibration, "depth": {"metric": metric, "greedy": greedy}},
        ).document("plan.json")["selection"]["num_hidden_layers"]
        for greedy in (False, True)
    ]  # fmt: skip
    assert kept[0] == kept[1]


def test_a_compile_keeps_what_was_never_dropped(foundry: Foundry) -> None:
    importance = {"data": foundry.calibration, "depth": {"metric": "loss", "greedy": True}}
    teacher = foundry.teacher("llama", num_hidden_layers=4)
    build = foundry.build(teacher, {"num_hidden_layers": 2}, program=False, importance=importance)
    scores = build.tensors_of("scores.safetensors")["num_hidden_layers"].numpy()
    assert sorted(scores.tolist()) == [0, 1, 2, 2]
    (kept,) = build.document("plan.json")["selection"]["num_hidden_layers"]
    assert kept == np.flatnonzero(scores == 2).tolist()
    assert all(check["passed"] for check in build.checks.values())
    (phase,) = (one for one in build.document("plan.json")["phases"] if one["name"] == "calibrate")
    assert phase["does"].endswith(", and drops 2 layers one after the other")


class Killed(BaseException):
    """Stands in for the signal that ends a process wherever it is."""


class Mortal(Silent):
    """Counts the layers that rounds have tried; dies at the end of round number `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.done, self.total, self.tried = last, 0.0, 0.0, 0.0
        self.tasks: list[str] = []

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Any]:
        self.tasks.append(name)
        if name != "drop layers":
            with super().task(name, total, unit, done) as task:
                yield task
            return
        self.done, self.total = done, total
        yield self

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        self.tried += amount
        if self.last is not None:
            self.last -= 1
            if self.last == 0:
                raise Killed


@pytest.mark.parametrize("metric", ["loss", "logit_mse"])
def test_a_round_that_has_ended_is_not_repeated(foundry: Foundry, tmp_path: Path, metric: str) -> None:
    """Killed behind the second of three rounds: the third tries the two layers that are left, and nothing is calibrated
    again. The file that kept the rounds is gone once the scores are written."""
    importance = {"data": foundry.calibration, "depth": {"metric": metric, "greedy": True}}
    student = {"num_hidden_layers": 1, "intermediate_size": 24}
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=4), student, importance=importance)
    whole = foundry.compile(loaded, tmp_path / "apart" / "whole", program=False)
    with pytest.raises(Killed):
        foundry.compile(loaded, tmp_path / "killed", Mortal(2), program=False)
    assert (tmp_path / "killed" / PARTIAL_ROUNDS).is_file()
    calm = Mortal()
    again = foundry.compile(loaded, tmp_path / "killed", calm, program=False)
    assert "drop layers" in calm.tasks and "calibrate" not in calm.tasks
    assert (calm.done, calm.tried, calm.total) == (4 + 3, 2, 4 + 3 + 2)
    assert not (tmp_path / "killed" / PARTIAL_ROUNDS).exists()
    before, after = (one.tensors_of("scores.safetensors") for one in (whole, again))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert whole.document("plan.json")["selection"] == again.document("plan.json")["selection"]


def test_rounds_of_another_teacher_or_damaged_ones_are_not_taken_up(tmp_path: Path) -> None:
    rounds, scores = Rounds(tmp_path / "rounds.safetensors", "ours"), ScoreTable(hidden=np.ones(4, dtype=np.float32))
    assert rounds.read() is None
    for gone in ([], [2], [2, 0]):
        rounds.write(scores, gone)
        found = rounds.read()
        assert found is not None and found[1] == tuple(gone) and np.array_equal(found[0].hidden, scores.hidden)  # type: ignore[arg-type]
    assert Rounds(rounds.path, "theirs").read() is None
    content = bytearray(rounds.path.read_bytes())
    content[-1] ^= 1
    rounds.path.write_bytes(content)
    assert rounds.read() is None


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"greedy": True}, r"block influence describes a layer alone, not the model without it; write `metric: loss`"),
        ({"greedy": True, "metric": "loss", "contiguous": True}, r"need not be neighbours; keep either `greedy` or"),
    ],
)
def test_what_does_not_go_together(foundry: Foundry, depth: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecInvalid, match=rf"importance\.depth\.greedy: .*{message}"):
        foundry.load(
            foundry.teacher("llama"), {"num_hidden_layers": 2}, importance={"data": foundry.calibration, "depth": depth}
        )
