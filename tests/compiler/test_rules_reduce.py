"""Operators that take a whole axis together: what has no order is free and noted, what has an order is pinned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.compiler.toys import TOKENS, Toy, Traced, check, matters

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
Function = Callable[[torch.Tensor], torch.Tensor]


def width(function: Function, size: int = 8) -> Traced:
    """`function` of activations [batch, sequence, size] whose last axis is a free width."""
    return check(Toy(lambda s, x: function(x @ s.w), w=(6, size)), X, dynamic=(TOKENS,))


REDUCTIONS: dict[str, tuple[Function, set[str]]] = {
    "mean": (lambda y: y / y.square().mean(-1, keepdim=True), {"mean"}),
    "mean of squares of what a mean was taken from": (
        lambda y: (y - y.mean(-1, keepdim=True)).pow(2).mean(-1),
        {"mean", "variance"},
    ),
    "mean of squares and one": (lambda y: (y.square() + 1).mean(-1), {"variance"}),
    "mean of what a bias was added to": (lambda y: (y + y).square().mean(-1), {"mean"}),
    "mean of all": (lambda y: y.mean(), {"mean"}),
    "mean of several": (lambda y: y.mean((-1, -2)), {"mean"}),
    "sum": (lambda y: y.exp().sum(-1), {"sum"}),
    "sum of all": (lambda y: y.sum(), {"sum"}),
    "sum in another number format": (lambda y: y.sum(dtype=torch.float64), {"sum"}),
    "mean in another number format": (lambda y: y.mean(dtype=torch.float64), {"mean"}),
    "sum of several": (lambda y: y.cos().sum((0, -1)), {"sum"}),
    "product": (lambda y: y.prod(-1), {"prod"}),
    "product of all": (lambda y: y.prod(), {"prod"}),
    "log of a sum of exponentials": (lambda y: y.logsumexp(-1), {"logsumexp"}),
    "variance": (lambda y: torch.var(y, -1, correction=0), {"var"}),
    "variance by `unbiased`": (lambda y: y.var(-1, unbiased=False, keepdim=True) * y, {"var"}),
    "variance of all": (lambda y: y.var(unbiased=False), {"var"}),
    "standard deviation by `unbiased`": (lambda y: y.std((0, -1), unbiased=True), {"std"}),
    "standard deviation of all": (lambda y: y.std(), {"std"}),
    "variance beside the mean": (lambda y: torch.var_mean(y, -1, keepdim=True)[0] * y, {"var"}),
    "deviation beside the mean": (lambda y: torch.std_mean(y, -1, unbiased=False)[0], {"std"}),
    "both of all": (lambda y: torch.var_mean(y)[0], {"var"}),
    "standard deviation": (lambda y: torch.std(y, -1, keepdim=True, correction=1) * y, {"std"}),
    "largest": (lambda y: y.amax(-1), {"amax"}),
    "smallest": (lambda y: y.amin(-1, keepdim=True) + y, {"amin"}),
    "largest of all": (lambda y: y.max() + y.min(), {"max", "min"}),
    "largest along an axis": (lambda y: y.max(-1).values + y.min(-1).values, {"max", "min"}),
    "any": (lambda y: (y > 0).any(-1), {"any"}),
    "all": (lambda y: (y > 0).all(-1), {"all"}),
    "any and all of all": (lambda y: (y > 1).any() | (y > 0).all(), {"any", "all"}),
    "softmax": (lambda y: y.softmax(-1), {"softmax"}),
    "log softmax": (lambda y: F.log_softmax(y, -1), {"softmax"}),
    "largest few": (lambda y: y.topk(3, -1).values, {"topk"}),
    "smallest magnitude": (lambda y: torch.linalg.vector_norm(y, ord=-float("inf"), dim=-1), {"norm"}),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_has_no_order_is_free_and_noted(name: str) -> None:
    function, notes = REDUCTIONS[name]
    traced = width(function)
    assert not traced.pins("w", 1) and traced.notes("w", 1) == notes


NORMS: dict[str, Function] = {
    "euclidean": lambda y: torch.linalg.vector_norm(y, dim=-1),
    "of all": lambda y: torch.linalg.vector_norm(y),
    "of two axes": lambda y: torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True) * y,
    "absolute": lambda y: y.norm(p=1, dim=-1),
    "largest": lambda y: torch.linalg.vector_norm(y, ord=float("inf"), dim=-1),
    "normalised": lambda y: F.normalize(y, dim=-1),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_the_same_without_zeros(name: str) -> None:
    """`check` holds every axis without a note against masking, so no note is a claim that is tried."""
    traced = width(NORMS[name])
    assert not traced.pins("w", 1) and not traced.notes("w", 1)


class TestNormLayers:
    def test_layer_norm_shares_its_axes_with_its_weights(self) -> None:
        toy = Toy(lambda s, x: F.layer_norm(x @ s.w, (8,), s.g, s.b), w=(6, 8), g=(8,), b=(8,))
        traced = check(toy, X, dynamic=(TOKENS,))
        assert traced.same(("w", 1), ("g", 0), ("b", 0)) and traced.notes("g", 0) == {"layer_norm"}

    def test_layer_norm_over_two_axes(self) -> None:
        toy = Toy(lambda s, x: F.layer_norm((x @ s.w).unflatten(-1, (2, 4)), (2, 4), s.g), w=(6, 8), g=(2, 4))
        traced = check(toy, X, dynamic=(TOKENS,))
        assert traced.describe("w") == ["6", "2 x 4"] and traced.notes("g", 0) == traced.notes("g", 1) == {"layer_norm"}

    def test_layer_norm_without_weights(self) -> None:
        assert width(lambda y: F.layer_norm(y, (8,))).notes("w", 1) == {"layer_norm"}

    def test_rms_norm_as_one_operator_and_written_out(self) -> None:
        one = check(Toy(lambda s, x: F.rms_norm(x @ s.w, (8,), s.g), w=(6, 8), g=(8,)), X, dynamic=(TOKENS,))
        assert one.same(("w", 1), ("g", 0)) and one.notes("w", 1) == {"rms_norm"}

        def written(s: Toy, x: torch.Tensor) -> torch.Tensor:
            y = x @ s.w
            return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * s.g

        two = check(Toy(written, w=(6, 8), g=(8,)), X, dynamic=(TOKENS,))
        assert two.same(("w", 1), ("g", 0)) and two.notes("w", 1) == {"mean"}

    def test_a_norm_of_every_head_leaves_the_heads_alone(self) -> None:
        toy = Toy(lambda s, x: F.rms_norm((x @ s.w).unflatten(-1, (2, 4)), (4,), s.g), w=(6, 8), g=(4,))
        traced = check(toy, X, dynamic=(TOKENS,))
        heads, channels = traced.space.leaves(traced.dims("w")[1])
        assert not heads.notes and {note.kind for note in channels.notes} == {"rms_norm"}


ORDERED: dict[str, Function] = {
    "running sum": lambda y: y.cumsum(-1),
    "running product": lambda y: y.cumprod(-1),
    "running log of a sum": lambda y: y.logcumsumexp(-1),
    "differences": lambda y: y.diff(dim=-1),
    "second differences": lambda y: y.diff(n=2, dim=-1),
    "differences with a start": lambda y: y.diff(dim=-1, prepend=y[..., :1] * 2),
    "turned around": lambda y: y.flip(-1),
    "rolled": lambda y: y.roll(1, -1),
    "rolled by name": lambda y: torch.roll(y, shifts=(1, 2), dims=(1, 2)),
    "sorted": lambda y: y.sort(-1).values,
    "sorted stably": lambda y: torch.sort(y, stable=True, dim=-1, descending=True)[0],
}


@pytest.mark.parametrize("name", ORDERED)
def test_what_has_an_order_is_pinned(name: str) -> None:
    traced = width(ORDERED[name])
    assert "order" in traced.pins("w", 1)


@pytest.mark.parametrize("name", ["running sum", "differences", "turned around", "rolled"])
def test_the_order_does_matter(name: str) -> None:
    toy = Toy(lambda s, x: ORDERED[name](x @ s.w), w=(6, 8))
    assert matters(check(toy, X, dynamic=(TOKENS,)), "w", 1)


def test_running_sums_along_the_sequence_hold_no_width() -> None:
    traced = width(lambda y: y.cumsum(1))
    assert not traced.pins("w", 1)


def test_rolling_all_elements_holds_every_axis() -> None:
    traced = check(Toy(lambda s, x: (x @ s.w).roll(2), w=(6, 8)), X)
    assert traced.pins("w", 1) and matters(traced, "w", 1)


POSITIONS: dict[str, Function] = {
    "of the largest": lambda y: y.argmax(-1) * 1.0,
    "of the smallest, kept": lambda y: y.argmin(-1, keepdim=True) * y,
    "of the largest of all": lambda y: y.argmax() * 1.0,
    "with the largest": lambda y: y.max(-1).indices * 1.0,
    "of the largest few": lambda y: y.topk(3, -1).indices.sum(-1) * 1.0,
    "of the order": lambda y: y.sort(-1).indices[..., 0] * 1.0,
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_that_are_numbers_hold_their_axis(name: str) -> None:
    traced = width(POSITIONS[name])
    assert "positions along it are numbers that the model goes on with" in traced.pins("w", 1)


def test_how_many_entries_are_ranked_is_no_width() -> None:
    traced = width(lambda y: y.topk(3, -1).values)
    assert traced.describe("y")[2] == "3!"
