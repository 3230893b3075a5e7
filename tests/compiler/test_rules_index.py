"""Operators that pick elements by computed positions: what is indexed keeps its order, everything else is free."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.compiler.toys import TOKENS, Toy, Traced, check, matters, trace

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
PICKED = torch.tensor([0, 2, 2])


def tokens(toy: Toy, x: torch.Tensor = X) -> Traced:
    return check(toy, x, dynamic=(TOKENS,))


class TestEmbedding:
    def test_rows_are_held_and_channels_are_free(self) -> None:
        ids = torch.tensor([[1, 4, 2], [3, 3, 0]])
        net = torch.nn.Sequential(torch.nn.Embedding(7, 6, padding_idx=0), torch.nn.Linear(6, 4))
        traced = check(net, ids, dynamic=(TOKENS,))
        assert traced.describe("0.weight") == ["7!", "6"] and matters(traced, "0.weight", 0)
        assert traced.same(("0.weight", 1), ("1.weight", 1))
        assert traced.pins("0.weight", 0) == "indexed by token or position ids (embedding in 0)"

    def test_a_tied_head_holds_the_vocabulary_too(self) -> None:
        ids = torch.tensor([[1, 4, 2], [3, 3, 0]])
        traced = check(Toy(lambda s, i: F.linear(F.embedding(i, s.w).tanh(), s.w), w=(7, 6)), ids, dynamic=(TOKENS,))
        assert traced.describe("w") == ["7!", "6"] and traced.describe("y")[2] == "7!"

    def test_positions_along_an_axis_read_that_axis(self) -> None:
        """The most likely channel decides: its row of a table is read, wherever it stands."""
        traced = tokens(Toy(lambda s, x: F.embedding((x @ s.w).argmax(-1), s.v), w=(6, 8), v=(8, 4)))
        assert traced.describe("w") == ["6", "8"] and traced.describe("v") == ["8", "4"]
        assert traced.same(("w", 1), ("v", 0)) and traced.notes("v", 0) == {"max"}

    def test_a_table_of_another_size_reads_them_as_numbers(self) -> None:
        traced = tokens(Toy(lambda s, x: F.embedding((x @ s.w).argmax(-1), s.v), w=(6, 8), v=(9, 4)))
        assert "positions along it are numbers" in traced.pins("w", 1) and "indexed" in traced.pins("v", 0)
        assert matters(traced, "w", 1)


class TestIndex:
    @pytest.mark.parametrize(
        "read, result",
        [
            (lambda w: w[PICKED], ["3!", "8", "4"]),
            (lambda w: w[:, PICKED], ["6", "3!", "4"]),
            (lambda w: w[..., PICKED], ["6", "8", "3!"]),
            (lambda w: w[PICKED, :, PICKED], ["3!", "8"]),
            (lambda w: w[:, PICKED, PICKED], ["6", "3!"]),
            (lambda w: w[PICKED[:, None], PICKED], ["3!", "3!", "4"]),
        ],
    )
    def test_index_tensors_stand_where_numpy_puts_them(self, read: object, result: list[str]) -> None:
        traced = check(Toy(lambda s: read(s.w) * 1, w=(6, 8, 4)))  # type: ignore[operator]
        assert [word.rstrip("!") for word in traced.describe("y")] == [word.rstrip("!") for word in result]
        for axis, name in enumerate("684"):
            assert bool(traced.pins("w", axis)) == (name not in result)

    def test_index_tensors_apart_from_each_other_come_to_the_front(self) -> None:
        traced = check(Toy(lambda s: s.w[:, PICKED, :, PICKED] * 1, w=(2, 3, 4, 5)))
        assert traced.same(("w", 0), ("y", 1)) and traced.same(("w", 2), ("y", 2))

    def test_what_is_indexed_matters(self) -> None:
        traced = check(Toy(lambda s: s.w[:, PICKED] * 1, w=(6, 8, 4)))
        assert "indexed by computed positions" in traced.pins("w", 1) and matters(traced, "w", 1)

    def test_truth_values_take_as_many_dimensions_as_they_have(self) -> None:
        """Not looked into: all is pinned, and nothing falls over."""
        traced = trace(Toy(lambda s: s.w[s.m > 0], w=(6, 8), m=(6, 8)))
        assert traced.describe("w") == ["6!", "8!"] and "index" in traced.table.unknown

    def test_index_select(self) -> None:
        traced = check(Toy(lambda s: s.w.index_select(1, PICKED), w=(6, 8)))
        assert traced.describe("w") == ["6", "8!"] and matters(traced, "w", 1)

    def test_truth_values_that_list_positions_are_not_looked_into(self) -> None:
        traced = trace(Toy(lambda s, x: x[torch.where(x[:, 0, 0] > 0)[0]] @ s.w, w=(6, 8)), X, dynamic=(TOKENS,))
        assert "where" in traced.table.unknown


class TestWriting:
    @pytest.mark.parametrize("values", [(5, 2), (2, 5, 2), (1,), (5, 1)])
    def test_values_follow_the_axes_that_indexing_would_read(self, values: tuple[int, ...]) -> None:
        def put(s: Toy, x: torch.Tensor) -> torch.Tensor:
            y = (x @ s.w).clone()
            y[:, :, torch.tensor([1, 3])] = s.v
            return y

        traced = check(Toy(put, w=(6, 8), v=values), X)
        assert "indexed by computed positions" in traced.pins("w", 1) and matters(traced, "w", 1)
        if len(values) > 1 and values[-2] == 5:
            assert traced.same(("v", len(values) - 2), ("x", 1))

    def test_index_put_by_truth_values_is_not_looked_into(self) -> None:
        def put(s: Toy, x: torch.Tensor) -> torch.Tensor:
            y = (x @ s.w).clone()
            y[x[..., 0] > 0] = s.v
            return y

        assert "no rule" in trace(Toy(put, w=(6, 8), v=(8,)), X).pins("v", 0)

    def test_index_add_and_index_copy(self) -> None:
        rows = torch.tensor([1, 3, 0])
        for write in (torch.Tensor.index_add, torch.Tensor.index_copy):
            traced = check(Toy(lambda s, write=write: write(s.v, 0, rows, s.w), v=(4, 8), w=(3, 8)))
            assert traced.same(("w", 1), ("v", 1), ("y", 1)) and not traced.pins("w", 1)
            assert "indexed by computed positions" in traced.pins("v", 0) and matters(traced, "v", 0)

    def test_scatter_adds_along_one_axis_and_walks_the_others(self) -> None:
        def add(s: Toy, x: torch.Tensor) -> torch.Tensor:
            index = torch.full((2, 5, 8), 2, dtype=torch.long)
            return torch.zeros(2, 5, 8, dtype=x.dtype).scatter_add(1, index, x @ s.w)

        traced = check(Toy(add, w=(6, 8)), X)
        assert traced.same(("w", 1), ("y", 2)) and not traced.pins("w", 1)

    def test_scatter_of_a_part_takes_first_indices(self) -> None:
        index = torch.arange(3).expand(2, 5, 3)

        def part(s: Toy, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 5, 9, dtype=x.dtype).scatter(2, index, x @ s.w)

        traced = check(Toy(part, w=(6, 8)), X)
        assert "only its first indices are taken" in traced.pins("w", 1) and matters(traced, "w", 1)

    def test_a_router_that_scatters_its_choice(self) -> None:
        """What is written at the positions of the largest scores is written along their axis."""

        def route(s: Toy, x: torch.Tensor) -> torch.Tensor:
            scores = x @ s.w
            chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(2, -1).indices, 1.0)
            return (scores * chosen) @ s.v

        traced = tokens(Toy(route, w=(6, 8), v=(8, 3)))
        assert traced.same(("w", 1), ("v", 0)) and not traced.pins("w", 1) and traced.notes("w", 1) == {"topk"}

    def test_positions_that_are_written_as_values_are_numbers(self) -> None:
        def route(s: Toy, x: torch.Tensor) -> torch.Tensor:
            scores = x @ s.w
            chosen = scores.topk(2, -1).indices
            return scores.scatter(-1, chosen, chosen.to(x.dtype)) @ s.v

        traced = tokens(Toy(route, w=(6, 8), v=(8, 3)))
        assert "positions along it are numbers" in traced.pins("w", 1) and matters(traced, "w", 1)


class TestGather:
    def test_other_axes_are_walked_together(self) -> None:
        traced = check(Toy(lambda s: s.w.gather(1, torch.full((4, 2), 1, dtype=torch.long)), w=(4, 6)))
        assert traced.describe("w") == ["4", "6!"] and matters(traced, "w", 1)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_fewer_indices_take_the_first_only(self, rows: int) -> None:
        traced = check(Toy(lambda s: s.w.gather(1, torch.full((rows, 3), 1, dtype=torch.long)), w=(4, 6)))
        assert "only its first indices are taken" in traced.pins("w", 0) and matters(traced, "w", 0)


class TestCounting:
    def test_positions_become_the_axis_that_they_stand_for(self) -> None:
        toy = Toy(lambda s, x: F.one_hot((x @ s.w).argmax(-1), 8).to(x.dtype) @ s.v, w=(6, 8), v=(8, 4))
        traced = tokens(toy)
        assert traced.same(("w", 1), ("v", 0)) and not traced.pins("v", 0) and not traced.pins("v", 1)

    def test_one_class_more_than_there_are_positions_holds_them(self) -> None:
        toy = Toy(lambda s, x: F.one_hot((x @ s.w).argmax(-1), 9).to(x.dtype) @ s.v, w=(6, 8), v=(9, 4))
        traced = tokens(toy)
        assert "computed positions" in traced.pins("v", 0) and "numbers" in traced.pins("w", 1)

    @pytest.mark.parametrize(
        "bins, low, high, free", [(8, 0, 7, True), (8, 0, 8, False), (8, 1, 7, False), (9, 0, 8, False)]
    )
    def test_how_often_each_position_occurs(self, bins: int, low: int, high: int, free: bool) -> None:
        def load(s: Toy, x: torch.Tensor) -> torch.Tensor:
            chosen = (x @ s.w).topk(2, -1).indices
            return torch.histc(chosen.float().flatten(), bins, low, high).to(x.dtype) * s.v

        traced = tokens(Toy(load, w=(6, 8), v=(bins,)))
        assert bool(traced.pins("w", 1)) != free and bool(traced.pins("v", 0)) != free
        assert not free or traced.same(("w", 1), ("v", 0))

    def test_a_narrow_number_format_does_not_hold_all_positions(self) -> None:
        def load(s: Toy, x: torch.Tensor) -> torch.Tensor:
            return torch.histc((x @ s.w).argmax(-1).half().flatten().float(), 8, 0, 7).to(x.dtype) * s.v

        assert "numbers" in tokens(Toy(load, w=(6, 8), v=(8,))).pins("w", 1)

    def test_running_sums_of_counts_are_numbers(self) -> None:
        def ends(s: Toy, x: torch.Tensor) -> torch.Tensor:
            return torch.histc((x @ s.w).argmax(-1).float().flatten(), 8, 0, 7).cumsum(0).to(x.dtype) * s.v

        traced = tokens(Toy(ends, w=(6, 8), v=(8,)))
        assert "its order matters" in traced.pins("w", 1) and matters(traced, "v", 0)

    def test_counting_off_holds_an_axis(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w) * torch.arange(8), w=(6, 8)))
        assert "counted off by arange" in traced.pins("w", 1) and matters(traced, "w", 1)

    def test_reading_along_a_count_is_no_reading_of_numbers(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[..., torch.arange(8)], w=(6, 8)))
        assert not traced.pins("w", 1) and traced.same(("w", 1), ("y", 2))

    @pytest.mark.parametrize("start, end, step", [(1, 9, 1), (0, 16, 2)])
    def test_other_counts_are_numbers(self, start: int, end: int, step: int) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[..., torch.arange(start, end, step)], w=(6, 18)))
        assert "indexed by computed positions" in traced.pins("w", 1)
