"""Weights and moments in fewer bits: what is rounded, and that a training which uses them learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron.runtime.narrow import BLOCK, blocks_of, code_book, dequantize, quantize, round_stochastically
from minitron.runtime.optimizer import make_optimizer, set_learning_rate
from minitron.specs.blocks.training import Optimizer
from tests.runtime.learning import learn, resumes_to_the_byte

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.floats(-1e30, 1e30), st.integers(0, 99))
@settings(deadline=None)
def test_rounding_takes_one_of_the_two_neighbours(value: float, seed: int) -> None:
    exact = torch.full((16,), value, dtype=torch.float32)
    rounded = round_stochastically(exact, generator(seed)).float()
    below = (exact.view(torch.int32) & (-1 << 16)).view(torch.float32)
    above = ((exact.view(torch.int32) & (-1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((rounded == below) | (rounded == above)).all())
    kept = round_stochastically(rounded, generator(seed))
    assert torch.equal(kept.float(), rounded), "what bf16 has stays"


def test_rounding_is_right_in_expectation_and_keeps_what_is_no_number() -> None:
    exact = torch.tensor([1.0 + 1 / 1024, -3.0 - 1 / 300]).repeat(40000, 1)
    mean = round_stochastically(exact, generator()).double().mean(0)
    torch.testing.assert_close(mean, exact[0].double(), rtol=0, atol=2e-4)
    odd = round_stochastically(torch.tensor([torch.inf, -torch.inf, torch.nan]), generator())
    assert odd.tolist()[:2] == [float("inf"), float("-inf")] and bool(odd[2].isnan())


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_has_256_different_numbers_in_order(signed: bool) -> None:
    book = code_book(signed, CPU)
    assert book.shape == (256,) and bool((book.diff() > 0).all())
    assert float(book[-1]) == 1.0 and 0.0 in book.tolist() and float(book[0]) < 0.0 if signed else float(book[0]) == 0.0


@given(st.integers(1, 5), st.integers(1, 3 * BLOCK + 1), st.booleans(), st.integers(0, 9), st.floats(-6, 3))
@settings(deadline=None, max_examples=50)
def test_eight_bits_keep_each_number_to_the_nearest_code(
    rows: int, columns: int, signed: bool, seed: int, decade: float
) -> None:
    exact = torch.randn(rows, columns, generator=generator(seed)) * 10**decade
    exact = exact if signed else exact.square()
    exact[0] = 0.0
    codes, scales = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(blocks_of((rows, columns)))
    quantize(exact, signed, codes, scales)
    back = dequantize(codes, signed, scales)
    assert bool((back[0] == 0).all())
    book = code_book(signed, CPU).double()
    largest = scales.double().repeat_interleave(BLOCK, 1)[:, :columns].unsqueeze(-1)
    nearest = (exact.double().unsqueeze(-1) - book * largest).abs().amin(-1)
    assert bool(((exact.double() - back.double()).abs() <= nearest * (1 + 1e-5) + 1e-7 * largest[..., 0]).all())


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.LayerNorm(90), torch.nn.Linear(90, 50))


def test_in_fp32_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.runtime import narrow_adamw

    monkeypatch.setattr(narrow_adamw, "_PART", 1000)  # in parts of some rows
    wanted, got = model(), model()
    learn(wanted, make_optimizer(wanted, Optimizer(lr=1e-2)), range(4))
    optimizer = narrow_adamw.NarrowAdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim == 2 else 0.0} for p in got.parameters()],
        states="float32", bf16_weights=False, seed=0, lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    learn(got, optimizer, range(4))
    for one, other in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
def test_bf16_weights_move_by_steps_that_bf16_cannot_hold(states: Any) -> None:
    """At a rate of 5e-7 a weight of 0.02 changes by a hundredth of a bf16 step; 400 steps of one sign are four of them."""
    module = torch.nn.Linear(128, 256, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.02).copy_(module.weight.bfloat16())
    start = float(module.weight[0, 0].detach())
    optimizer = make_optimizer(module, Optimizer(weight_decay=0.0, states=states), bf16_weights=True)
    set_learning_rate(optimizer, 5e-7)
    for _ in range(400):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
    assert torch.equal(module.weight, module.weight.bfloat16().float())
    assert float(module.weight.detach().double().mean()) == pytest.approx(start - 400 * 5e-7, abs=1e-5)
    nearest = torch.tensor(start)
    for _ in range(400):
        nearest = (nearest - 5e-7).bfloat16().float()
    assert float(nearest) == start, "rounded to the nearest, it would not have moved"


@pytest.mark.parametrize(("states", "bits"), [("float32", 64), ("bfloat16", 32), ("int8", 16.5)])
def test_moments_take_the_room_that_the_page_says(states: Any, bits: float) -> None:
    module = torch.nn.Linear(1024, 256, bias=False)
    optimizer = make_optimizer(module, Optimizer(states=states))
    learn(module, optimizer, range(1))
    held = sum(value.nbytes for key, value in optimizer.state[module.weight].items() if key != "step")
    assert held * 8 / module.weight.numel() <= bits


@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_that_was_interrupted_gives_the_same_bytes(
    states: Literal["float32", "bfloat16", "int8"], bf16: bool, tmp_path: Path
) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        module = model()
        return module, make_optimizer(module, Optimizer(lr=1e-3, states=states), bf16_weights=bf16, seed=7)

    resumes_to_the_byte(fresh, tmp_path)


def quadratic(states: Any, bf16: bool, lr: float) -> Tensor:
    """Least squares with noise: the loss after some hundred steps, over the best there is."""
    torch.manual_seed(0)
    inputs, target = torch.randn(512, 64), torch.randn(64, 64) * 0.1
    wanted = inputs @ target.T + 0.01 * torch.randn(512, 64)
    module = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        module.weight.copy_(module.weight.bfloat16())
    optimizer = make_optimizer(module, Optimizer(weight_decay=0.0, states=states), bf16_weights=bf16)
    for step in range(300):
        set_learning_rate(optimizer, lr * (1 - step / 300))
        loss = (module(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (module(inputs) - wanted).square().mean().detach()


@pytest.mark.parametrize(
    ("states", "bf16", "within"), [("bfloat16", True, 0.01), ("int8", True, 0.06), ("int8", False, 0.06)]
)
def test_it_learns_as_far_as_fp32(states: Any, bf16: bool, within: float) -> None:
    """Far from the minimum and near it. (Language models forgive 8 bits more: benchmarks/narrow_training.py.)"""
    for lr in (1e-4, 1e-3):
        assert float(quadratic(states, bf16, lr)) == pytest.approx(float(quadratic("float32", False, lr)), rel=within)
