"""`importance.depth.greedy`: layers go one after the other, and what is left is scored anew."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler.importance.layer_elimination import LayerElimination
from minitron.compiler.plan.plan import Plan
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


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"greedy": True}, r"block influence is a layer's own and not what is left without it; write `metric: loss`"),
        ({"greedy": True, "metric": "loss", "contiguous": True}, r"are no run of neighbours; keep either `greedy` or"),
    ],
)
def test_what_does_not_go_together(foundry: Foundry, depth: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecInvalid, match=rf"importance\.depth\.greedy: .*{message}"):
        foundry.load(
            foundry.teacher("llama"), {"num_hidden_layers": 2}, importance={"data": foundry.calibration, "depth": depth}
        )
