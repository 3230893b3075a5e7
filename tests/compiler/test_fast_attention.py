"""Masks that are the causal one become `is_causal`; any other stays, and the model is the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.compiler.graph.by_shape import is_causal
from tests.foundry import Foundry, executor, logits, teacher_model, token_ids


def lower(size: int) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (lower(5), True),
        (lower(5).expand(3, 1, 5, 5), True),
        (torch.zeros(5, 5).masked_fill(~lower(5), float("-inf")).expand(2, 1, 5, 5), True),
        (torch.zeros(5, 5).masked_fill(~lower(5), torch.finfo(torch.float32).min), True),
        (lower(1030), True),
        (torch.ones(5, 5, dtype=torch.bool), False),
        (lower(5) & ~lower(5).tril(-3), False),  # a window
        (torch.zeros(5, 5).masked_fill(~lower(5), -1e4), False),  # nearly hidden is seen
        (torch.full((5, 5), 0.5).masked_fill(~lower(5), float("-inf")), False),  # and a bias is a bias
        (torch.ones(5, 6, dtype=torch.bool).tril(), False),
        (torch.stack([lower(5), lower(5).T]), False),  # two samples, of which one is hidden otherwise
        (3, False),
    ],
)
def test_a_causal_mask_is_known_by_what_it_holds(mask: Any, wanted: bool) -> None:
    assert is_causal(mask) is wanted


def test_a_late_row_that_sees_too_much_is_found() -> None:
    mask = lower(1500)
    mask[1400, 1450] = True
    assert not is_causal(mask)


class Attention(TorchDispatchMode):
    """Counts calls of attention by whether they are given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[bool]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(function):
            tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
            self.calls[len(tensors) > 3] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "length", "masked"),
    [
        ("llama", 24, 0),
        ("mistral", 24, 3),
        ("mistral", 6, 0),
        ("gemma2", 24, None),
        ("qwen2", 24, 2),
        ("mixtral", 24, 0),
    ],
)
def test_the_model_is_the_same(foundry: Foundry, family: str, length: int, masked: int | None) -> None:
    """A window of 8 tokens hides nothing of a sequence of 6. Attention that is written out in operators is left alone."""
    plan, ids = foundry.whole(family), token_ids(2, length)
    found: list[torch.Tensor] = []
    attention = Attention()
    with attention:
        executor(plan, fast=True).run([ids], output=lambda value, _: found.append(value))
    torch.testing.assert_close(found[0], logits(teacher_model(plan), ids), rtol=1e-4, atol=1e-5)
    if masked is not None:
        assert (attention.calls[True], attention.calls[False]) == (masked, 3 - masked)
