"""The learning rate's course, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minitron.runtime.optimizer import make_optimizer, set_learning_rate
from minitron.runtime.schedule import learning_rate
from minitron.specs.blocks.training import Optimizer
from tests.runtime import tiny


@given(steps=st.integers(1, 300), warmup=st.integers(0, 300))
@settings(deadline=None)
def test_up_in_a_line_then_down_to_the_end(steps: int, warmup: int) -> None:
    optimizer = Optimizer(lr=1e-3, min_lr=1e-5, warmup_steps=warmup)
    rates = [learning_rate(step, steps, optimizer) for step in range(steps)]
    top = min(warmup, steps)
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[:top] == pytest.approx([1e-3 * (step + 1) / top for step in range(top)] if top else [])
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    if steps > warmup:
        assert rates[-1] == pytest.approx(1e-5)


def test_halfway_it_is_in_the_middle() -> None:
    assert learning_rate(49, 100, Optimizer(lr=1.0, min_lr=0.0, warmup_steps=0)) == pytest.approx(0.5)


def test_norms_and_biases_do_not_decay() -> None:
    model = AutoModelForCausalLM.from_config(tiny.llama(attention_bias=True))
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.1, eps=1e-7, betas=(0.8, 0.9)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(names)
    assert {name for name, decay in decays.items() if decay == 0} == {n for n in decays if "norm" in n or "bias" in n}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["eps"] == 1e-7


def test_the_rate_is_set_for_all_groups() -> None:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), Optimizer())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
