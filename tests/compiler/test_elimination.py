"""`importance.selection: greedy`: the order in which neurons and heads are eliminated."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler.importance.elimination import PUT_OFF, RIDGE, eliminate, eliminate_heads, eliminate_units
from minitron.specs.errors import SpecInvalid
from tests.foundry import Foundry


def drawn(seed: int, tokens: int = 300, width: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of correlated activations, their Gram matrix, and a projection that reads them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    rows = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix
    return rows, rows.T @ rows / tokens, torch.randn(4, width, generator=generator, dtype=torch.float64)


def loss_without(gram: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """The squared error of the best projection of the kept columns, ridge and all, worked out anew."""
    regular = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    best = weight @ regular[:, kept] @ torch.linalg.inv(regular[kept][:, kept])
    whole = torch.zeros_like(weight)
    whole[:, kept] = best
    return float(((weight - whole) @ regular * (weight - whole)).sum())


@pytest.mark.parametrize(("seed", "size"), [*itertools.product(range(3), (1, 2))])
def test_every_step_takes_the_unit_that_costs_least(seed: int, size: int) -> None:
    _, gram, weight = drawn(seed)
    steps = eliminate(gram, weight, size)
    left = list(range(6 // size))
    for step in range(len(steps) - 1):
        losses = {
            one: loss_without(gram, weight, [u * size + i for u in left if u != one for i in range(size)])
            for one in left
        }
        gone = min(left, key=lambda one: losses[one])
        assert steps[gone] == step, (losses, steps)
        left.remove(gone)


@pytest.mark.parametrize("seed", range(3))
def test_updates_that_are_put_off_change_nothing(seed: int) -> None:
    """More columns than are put off, eliminated as units of one column: the same order."""
    _, gram, weight = drawn(seed, tokens=400, width=2 * PUT_OFF + 9)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    assert (
        eliminate(gram, weight).tolist() == eliminate_units(torch.linalg.inv(gram + ridge), weight.clone(), 1).tolist()
    )


def test_what_others_repeat_goes_first() -> None:
    rows, _, weight = drawn(7)
    rows[:, 5] = 2 * rows[:, 0] - rows[:, 1]
    gram = rows.T @ rows / len(rows)
    assert set(np.argsort(eliminate(gram, weight))[:1]) <= {0, 1, 5}


def test_groups_go_whole_and_heads_within_them() -> None:
    _, gram, weight = drawn(3, width=12)
    scores = eliminate_heads(gram, weight, SimpleNamespace(groups=3, repeats=2))  # type: ignore[arg-type]
    assert scores.shape == (3, 2)
    strength = np.square(scores).sum(1)
    assert (np.argsort(strength) == np.argsort(eliminate(gram, weight, 4))).all()
    of_head = eliminate(gram, weight, 2).reshape(3, 2)
    assert (np.argsort(scores, axis=1) == np.argsort(of_head, axis=1)).all()


def test_greedy_in_a_spec(foundry: Foundry) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    student: dict[str, Any] = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    importance = {"data": foundry.calibration, "selection": "greedy"}
    build = foundry.build(
        teacher, student, program=False, importance=importance, recovery={"refit": "least_squares"}
    )  # fmt: skip
    steps = build.tensors_of("scores.safetensors")["intermediate_size.1"]
    assert sorted(steps.tolist()) == list(range(40))
    kept = build.document("plan.json")["selection"]["intermediate_size"][1]
    assert kept == sorted(steps.argsort(descending=True)[:24].tolist())
    assert all(check["passed"] for check in build.checks.values())


def test_elimination_without_a_refit(foundry: Foundry) -> None:
    with pytest.raises(SpecInvalid) as caught:
        foundry.load(
            foundry.teacher("llama"), {"intermediate_size": 24},
            importance={"data": foundry.calibration, "selection": "greedy"},
        )  # fmt: skip
    (error,) = caught.value.errors
    assert error.path == "importance.selection"
    assert error.message == "greedy keeps what is best after a refit of the projections, and none is asked for"
    assert error.hint == "write scores, or `recovery: {refit: least_squares}`"
