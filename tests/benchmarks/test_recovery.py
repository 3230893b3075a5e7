"""benchmarks/recovery.py: the search for a rate, the tokens that a curve needs, and the norms of weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minitron.compiler.compile import Stages
from minitron.specs import load_spec
from tests.benchmarks.load import load_benchmark
from tests.foundry import Foundry


@pytest.fixture(scope="module")
def recovery() -> ModuleType:
    return load_benchmark("recovery")


def bench(recovery: ModuleType, excess: Any) -> Any:
    """A bench whose trainings are a function of rate and seed."""

    class Known(recovery.Bench):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self.runs: list[tuple[float, int]] = []

        def trained(self, case: str, name: str, tokens: int, lr: float, seed: int) -> dict[str, float]:
            self.runs.append((lr, seed))
            return {"excess": excess(lr, seed), "effective_rank": 1.0}

    return Known()


def test_rates_go_on_as_long_as_the_best_is_at_an_end(recovery: ModuleType) -> None:
    known = bench(recovery, lambda lr, seed: abs(np.log(lr / 1e-3)))
    found = known.best("all-75", "channels", 1000, [4e-3, 8e-3, 1.6e-2], 1)
    assert sorted(found) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2] and next(iter(found)) == 1e-3


def test_rates_do_not_go_on_for_ever(recovery: ModuleType) -> None:
    known = bench(recovery, lambda lr, seed: lr)
    assert len(known.best("all-75", "channels", 1000, [1.0, 2.0, 4.0], 1)) == recovery.MOST_RATES


def test_more_seeds_are_trained_at_the_two_best_rates(recovery: ModuleType) -> None:
    """And decide between them: at the first seed the rate 2 was the luckier one."""
    known = bench(recovery, lambda lr, seed: {1.0: 9.0, 2.0: 1.0 + 3 * seed, 4.0: 1.5, 8.0: 9.0}[lr])
    found = known.best("all-75", "channels", 1000, [1.0, 2.0, 4.0, 8.0], 3)
    assert next(iter(found)) == 4.0 and [len(one) for one in found.values()] == [3, 3, 1, 1]


def test_tokens_that_a_curve_needs(recovery: ModuleType) -> None:
    curve = {100: 4.0, 400: 1.0}  # in logarithms a straight line: excess = 400 / tokens
    assert recovery.tokens_to_reach(curve, 2.0) == pytest.approx(200)
    assert recovery.tokens_to_reach(curve, 1.0) == pytest.approx(400)
    assert recovery.tokens_to_reach(curve, 0.9) is None
    assert recovery.tokens_to_reach(curve, 5.0) == 100  # at most


def test_arms_are_values_of_the_spec(recovery: ModuleType, foundry: Foundry, tmp_path: Path) -> None:
    """Every arm is a spec that can be read."""
    families = {"all-75": "qwen3", "experts-50": "qwen3_moe"}
    for case, family in families.items():
        known = recovery.Bench.__new__(recovery.Bench)
        known.teacher, known.work, known.batch = foundry.teacher(family, num_hidden_layers=2), tmp_path, 8
        spec = known.spec(case)
        arms = [arm for name, arm in recovery.ARMS.items() if ("experts" in name) == ("experts" in case)]
        assert arms
        for arm in arms:
            values = [*recovery.overrides(arm)]
            student = load_spec(spec, values).spec.student
            assert len(values) == len(arm.values)
            assert (student.hidden_size, student.num_experts).count(None) == 1, "what the case narrows"


def test_norms_are_those_of_all_weights_that_go_together(
    recovery: ModuleType, foundry: Foundry, tmp_path: Path
) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    loaded = foundry.load(teacher, {"intermediate_size": 24, "num_attention_heads": 2})
    found = []

    def score(compilation: Any) -> Any:
        found.append(recovery.weight_norms(compilation))
        return found[-1]

    build = foundry.compile(loaded, tmp_path / "build", stages=replace(Stages(), score=score))
    scores = found[0][0]
    weights = load_file(teacher / "model.safetensors")
    gate, up, down = (weights[f"model.layers.1.mlp.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
    neurons = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
    torch.testing.assert_close(torch.from_numpy(scores.widths["intermediate_size"][1]), neurons.float())
    total = sum(float(weight.double().square().sum()) for name, weight in weights.items() if "norm" not in name)
    norms = sum(float(weight.double().square().sum()) for name, weight in weights.items() if "norm" in name)
    assert float(scores.hidden.sum()) == pytest.approx(total + norms, rel=1e-5), (
        "every weight reads or writes a channel"
    )
    kept = build.document("plan.json")["selection"]["intermediate_size"][1]
    assert kept == sorted(np.argsort(-neurons.numpy())[:24].tolist())
