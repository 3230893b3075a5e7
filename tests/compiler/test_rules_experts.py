"""Rows that are sent to experts: the numbering of the experts is free, as long as nothing reads an order into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the grouped product that graphs of experts hold)

from tests.compiler.toys import TOKENS, Toy, Traced, check, matters, trace

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
EXPERTS, CHOSEN = 8, 2
Order = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
    return product


def dispatch(
    s: Toy,
    x: torch.Tensor,
    *,
    after: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
    counted: Callable[[torch.Tensor], torch.Tensor] = lambda chosen: chosen,
    back: bool = True,
) -> torch.Tensor:
    """A mixture as transformers writes it: rows are sorted by expert, multiplied group by group, and put back."""
    flat = x.reshape(-1, 6)
    scores, chosen = (flat @ s.router).softmax(-1).topk(CHOSEN, -1)
    chosen = chosen.reshape(-1)
    sorted_, order = torch.sort(chosen)
    rows = flat[order // CHOSEN]
    counts = torch.histc(counted(sorted_).float(), EXPERTS, 0, EXPERTS - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    hidden = (grouped(rows, s.up, ends) + s.bias[sorted_]).tanh()
    out = after(grouped(hidden, s.down, ends) * scores.reshape(-1)[order].unsqueeze(-1))
    if not back:
        return out
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0))
    return out[inverse].view(-1, CHOSEN, 3).sum(1)


SHAPES = {"router": (6, EXPERTS), "up": (EXPERTS, 6, 4), "bias": (EXPERTS, 4), "down": (EXPERTS, 4, 3)}


def mixture(**changes: object) -> Traced:
    toy = Toy(lambda s, x: dispatch(s, x, **changes), **SHAPES)  # type: ignore[arg-type]
    return trace(toy, X, dynamic=(TOKENS,))


def test_experts_are_numbered_as_one_likes() -> None:
    """Permuted and narrowed, every free axis: that of the experts, of their channels, and the widths on both sides."""
    traced = check(Toy(dispatch, **SHAPES), X, dynamic=(TOKENS,))
    assert traced.describe("up") == ["8", "6", "4"] and traced.describe("down") == ["8", "4", "3"]
    assert traced.same(("router", 1), ("up", 0), ("bias", 0), ("down", 0))
    assert traced.notes("router", 1) == {"softmax", "topk"} and not traced.notes("up", 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"after": lambda rows: rows.cumsum(0)},
        {"after": lambda rows: rows * torch.arange(rows.shape[0]).unsqueeze(-1)},
        {"after": lambda rows: rows + rows.flip(0)},
        {"after": lambda rows: rows.view(-1, CHOSEN, 3).sum(1, keepdim=True).expand(-1, CHOSEN, 3).reshape(-1, 3)},
        {"counted": lambda chosen: EXPERTS - 1 - chosen},
        {"counted": lambda chosen: chosen.clamp(max=EXPERTS - 2)},
    ],
    ids=["running sum", "numbered rows", "turned rows", "rows in pairs", "other numbers counted", "fewer counted"],
)
def test_an_order_of_the_sorted_rows_holds_the_experts(changes: dict[str, object]) -> None:
    traced = mixture(**changes)
    assert traced.pins("up", 0) and matters(traced, "up", 0) if "after" in changes else traced.pins("up", 0)


def test_rows_that_are_not_put_back_hold_the_experts() -> None:
    """They meet the rows of the input, which stand in their own order."""

    def unsorted(s: Toy, x: torch.Tensor) -> torch.Tensor:
        out = dispatch(s, x, back=False)
        return out.view(-1, CHOSEN, 3).sum(1) + x.reshape(-1, 6)[:, :3]

    traced = trace(Toy(unsorted, **SHAPES), X, dynamic=(TOKENS,))
    assert "read in their order" in traced.pins("up", 0) and matters(traced, "up", 0)


def test_rows_of_another_sort_are_other_rows() -> None:
    def crossed(s: Toy, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 6)
        first, second = (torch.sort((flat @ w).argmax(-1)) for w in (s.router, s.other))
        ends = torch.histc(first[0].float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        return grouped(flat[second[1]], s.up, ends).sum(0)

    traced = trace(Toy(crossed, router=(6, EXPERTS), other=(6, EXPERTS), up=(EXPERTS, 6, 4)), X, dynamic=(TOKENS,))
    assert "rows are given to its indices by numbers" in traced.pins("up", 0)


def test_a_sort_of_numbers_holds_what_is_sorted() -> None:
    traced = trace(Toy(lambda s, x: (x @ s.router).sort(-1).values, router=(6, 8)), X, dynamic=(TOKENS,))
    assert "put in their order" in traced.pins("router", 1)


def test_dividing_positions_by_what_is_no_factor_reads_numbers() -> None:
    def divided(s: Toy, x: torch.Tensor) -> torch.Tensor:
        return s.table[(x @ s.router).argmax(-1) // 3]

    traced = trace(Toy(divided, router=(6, 8), table=(3, 4)), X, dynamic=(TOKENS,))
    assert "positions along it are numbers" in traced.pins("router", 1) and traced.pins("table", 0)
