"""The axis algebra: what is learnt of a dimension, and what follows from it."""

from __future__ import annotations

import pytest
import torch

from minitron.compiler.axes.dims import Dim, Note, Size, Space, size_of


@pytest.fixture
def space() -> Space:
    return Space()


def n(space: Space, *sizes: int) -> Dim:
    """A product of fresh atoms."""
    return tuple(atom for size in sizes for atom in space.fresh(Size(size)))


def pinned(space: Space, dim: Dim) -> list[bool]:
    return [bool(leaf.pins) for leaf in space.leaves(dim)]


def reasons(space: Space, dim: Dim) -> set[str]:
    return {str(pin) for leaf in space.leaves(dim) for pin in leaf.pins}


class TestSize:
    def test_a_size_is_a_number_times_symbols(self) -> None:
        assert str(Size(2, ("s0", "s1"))) == "2*s0*s1"
        assert str(Size(1, ("s0",))) == "s0"
        assert str(Size(1)) == "1"
        assert Size(1).is_one and not Size(1, ("s0",)).is_one

    def test_products_and_exact_quotients(self) -> None:
        rows = Size(6, ("s0", "s1", "s1"))
        assert Size(2, ("s1",)) * Size(3, ("s0", "s1")) == rows
        assert rows.divided_by(Size(3, ("s1",))) == Size(2, ("s0", "s1"))
        assert rows.divided_by(Size(1)) == rows
        assert rows.divided_by(rows) == Size(1)

    @pytest.mark.parametrize("divisor", [Size(4), Size(1, ("s2",)), Size(1, ("s0", "s0")), Size(0)])
    def test_no_quotient_where_there_is_none(self, divisor: Size) -> None:
        assert Size(6, ("s0", "s1", "s1")).divided_by(divisor) is None

    def test_sizes_of_traced_tensors(self) -> None:
        """Monomials are taken apart; what is no monomial is one symbol that nothing divides but itself."""
        found: dict[str, Size] = {}

        class Module(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                batch, length = x.shape
                for name, value in {
                    "int": 7,
                    "symbol": batch,
                    "monomial": 2 * batch * length * length,
                    "sum": length + 1,
                    "half": length // 2,
                }.items():
                    found[name] = Size.of(value)
                return x + 1

        batch, length = torch.export.Dim("batch", min=4, max=64), torch.export.Dim("length", min=4, max=64)
        torch.export.export(Module(), (torch.zeros(6, 8),), dynamic_shapes=({0: batch, 1: length},), strict=False)
        assert found["int"] == Size(7)
        (b,) = found["symbol"].symbols
        assert found["monomial"].coefficient == 2 and found["monomial"].symbols.count(b) == 1
        assert len(found["monomial"].symbols) == 3
        for name in ("sum", "half"):
            assert found[name].coefficient == 1 and len(found[name].symbols) == 1
            assert found[name].divided_by(found["symbol"]) is None


class TestUnify:
    def test_equal_sizes_become_one_axis(self, space: Space) -> None:
        a, b, c = (n(space, 8) for _ in range(3))
        space.unify(a, b, "add")
        space.unify(b, c, "add")
        assert len({space.find(atom) for atom in (*a, *b, *c)}) == 1
        assert pinned(space, a) == [False]

    def test_a_number_is_a_product_once_the_other_side_is(self, space: Space) -> None:
        whole, heads, width = n(space, 24), n(space, 4), n(space, 6)
        space.unify(whole, (*heads, *width), "contract")
        assert space.flat(whole) == space.flat((*heads, *width))

    def test_products_are_matched_from_the_fastest(self, space: Space) -> None:
        """(6 x 4) and (2 x 12): 12 is 3 x 4, and 6 is 2 x 3."""
        a, b = n(space, 6, 4), n(space, 2, 12)
        space.unify(a, b, "add")
        assert space.describe(a) == space.describe(b) == "2 x 3 x 4"
        assert space.flat(a) == space.flat(b)

    def test_concatenations_are_refined_at_each_others_boundaries(self, space: Space) -> None:
        a, b = space.cat([n(space, 3), n(space, 9)]), space.cat([n(space, 5), n(space, 7)])
        space.unify(a, b, "add")
        assert [leaf.size.coefficient for leaf in space.leaves(a)] == [3, 2, 7]
        assert list(space.leaves(a)) == list(space.leaves(b))

    def test_a_concatenation_of_multiples_is_a_product(self, space: Space) -> None:
        """Query, key and value stacked, each with heads of one width, are heads of that width stacked."""
        fused, width = space.cat([n(space, 16), n(space, 8), n(space, 8)]), n(space, 4)
        space.unify(fused, (*n(space, 8), *width), "view")
        assert space.describe(fused) == "(4 + 2 + 2) x 4"

    def test_a_size_of_one_follows_whatever_it_meets(self, space: Space) -> None:
        one, eight = n(space, 1), n(space, 8)
        assert one == () and space.describe(one) == "1"
        space.unify(one, one, "add")
        assert pinned(space, eight) == [False]

    @pytest.mark.parametrize("left, right", [((4, 6), (6, 4)), ((9,), (2, 4)), ((8,), (4,)), ((2, 5), (5, 2))])
    def test_what_does_not_match_pins_both_sides(
        self, space: Space, left: tuple[int, ...], right: tuple[int, ...]
    ) -> None:
        a, b = n(space, *left), n(space, *right)
        space.unify(a, b, "add in model.layers.0")
        space.settle()
        assert all(pinned(space, a)) and all(pinned(space, b))
        for reason in reasons(space, a) | reasons(space, b):
            assert "two views cut this axis in ways that do not match" in reason
            assert reason.endswith("(add in model.layers.0)")

    def test_factors_that_did_match_stay_free(self, space: Space) -> None:
        a, b = n(space, 4, 6, 5), n(space, 6, 4, 5)
        space.unify(a, b, "add")
        assert pinned(space, a) == [True, True, False]

    def test_parts_that_no_factor_divides_pin_both(self, space: Space) -> None:
        a, b = space.cat([n(space, 3), n(space, 5)]), n(space, 2, 4)
        space.unify(a, b, "view")
        space.settle()
        assert all(pinned(space, a)) and all(pinned(space, b))

    def test_symbols_are_told_from_numbers_and_from_each_other(self, space: Space) -> None:
        batch, sequence = space.fresh(Size(1, ("s0",))), space.fresh(Size(1, ("s1",)))
        rows = space.fresh(Size(1, ("s0", "s1")))
        space.unify(rows, (*batch, *sequence), "view")
        assert space.flat(rows) == space.flat((*batch, *sequence)) and pinned(space, rows) == [False, False]
        space.unify(batch, sequence, "add")
        assert pinned(space, batch) == [True]

    def test_a_width_within_rows_is_found(self, space: Space) -> None:
        """Two experts a token: 2*s0 rows are s0 tokens times 2."""
        rows, tokens = space.fresh(Size(2, ("s0",))), space.fresh(Size(1, ("s0",)))
        space.unify(rows, (*tokens, *n(space, 2)), "view")
        assert space.describe(rows) == "s0 x 2"

    def test_an_axis_stays_broadcast_only_if_both_sides_are(self, space: Space) -> None:
        a, b, c = space.fresh(Size(4), broadcast=True), space.fresh(Size(4), broadcast=True), n(space, 4)
        space.unify(a, b, "add")
        assert space.find(a[0]).broadcast
        space.unify(a, c, "add")
        assert not space.find(c[0]).broadcast


class TestPins:
    def test_a_pin_that_came_before_the_structure_reaches_the_leaves(self, space: Space) -> None:
        whole = n(space, 24)
        space.pin(whole, "a table", "rotary")
        space.unify(whole, n(space, 4, 6), "view")
        left = space.slice(whole, 0, 12, "slice")
        space.settle()
        assert pinned(space, whole) == [True] * 3
        assert reasons(space, left) == {"a table (rotary)"}

    def test_a_pin_on_one_part_leaves_the_others_free(self, space: Space) -> None:
        parts = n(space, 4), n(space, 12)
        whole = space.cat(parts)
        space.pin(parts[0], "a table")
        space.settle()
        assert pinned(space, whole) == [True, False]
        assert space.describe(whole) == "(4! + 12)"

    def test_a_pin_on_the_fast_factor_is_in_every_concatenation_of_it(self, space: Space) -> None:
        heads, width = n(space, 4), n(space, 6)
        whole = space.cat([(*heads, *width), width])
        space.pin(width, "a table")
        space.settle()
        assert space.describe(whole) == "(4 x 6! + 6!)"

    def test_merging_keeps_the_pins_and_notes_of_both(self, space: Space) -> None:
        a, b = n(space, 8), n(space, 8)
        space.pin(a, "first")
        space.pin(b, "second")
        space.note(b, Note("mean", "mean_1", "norm"))
        space.unify(a, b, "add")
        assert reasons(space, a) == {"first", "second"}
        assert {note.kind for note in space.find(a[0]).notes} == {"mean"}

    def test_notes_flow_like_pins(self, space: Space) -> None:
        whole = n(space, 24)
        space.note(whole, Note("layer_norm", "layer_norm_3", "norm"))
        space.unify(whole, n(space, 4, 6), "view")
        space.settle()
        assert all({note.node for note in leaf.notes} == {"layer_norm_3"} for leaf in space.leaves(whole))
        assert pinned(space, whole) == [False, False]

    def test_settling_twice_changes_nothing(self, space: Space) -> None:
        whole = n(space, 24)
        space.pin(whole, "a table")
        space.slice(whole, 0, 8, "slice")
        space.settle()
        before = space.describe(whole)
        space.settle()
        assert space.describe(whole) == before


class TestReshape:
    def test_a_number_is_split(self, space: Space) -> None:
        whole = n(space, 24)
        heads, width = space.reshape([whole], [Size(4), Size(6)], "view")
        assert space.flat(whole) == (*heads, *width)

    def test_there_and_back_leaves_the_same_leaves(self, space: Space) -> None:
        whole = n(space, 24)
        split = space.reshape([whole], [Size(4), Size(6)], "view")
        (again,) = space.reshape(split, [Size(24)], "view")
        assert space.flat(again) == space.flat(whole)

    def test_sizes_of_one_come_and_go(self, space: Space) -> None:
        whole = n(space, 24)
        dims = space.reshape([whole, ()], [Size(1), Size(4), Size(1), Size(6)], "view")
        assert [space.describe(dim) for dim in dims] == ["1", "4", "1", "6"]

    def test_an_atom_across_a_boundary_is_split_there(self, space: Space) -> None:
        a, b = n(space, 6), n(space, 4)
        slow, fast = space.reshape([a, b], [Size(2), Size(12)], "view")
        assert space.describe(slow) == "2" and space.describe(fast) == "3 x 4"
        assert space.describe(a) == "2 x 3"

    def test_batch_and_sequence_pass_through(self, space: Space) -> None:
        batch, sequence, hidden = space.fresh(Size(1, ("s0",))), space.fresh(Size(1, ("s1",))), n(space, 24)
        rows, width = space.reshape([batch, sequence, hidden], [Size(1, ("s0", "s1")), Size(24)], "view")
        assert rows == (*batch, *sequence) and width == hidden

    def test_a_concatenation_is_split_in_each_of_its_parts(self, space: Space) -> None:
        fused = space.cat([n(space, 16), n(space, 8)])
        heads, _width = space.reshape([fused], [Size(6), Size(4)], "view")
        assert space.describe(heads) == "(4 + 2)" and space.describe(fused) == "(4 + 2) x 4"
        assert pinned(space, fused) == [False] * 3

    def test_the_parts_of_a_concatenation_learn_of_its_view(self, space: Space) -> None:
        """Else a list for the heads would leave the parts whole where they stand alone."""
        query, key = n(space, 16), n(space, 8)
        heads, width = space.reshape([space.cat([query, key])], [Size(6), Size(4)], "view")
        assert space.describe(query) == "4 x 4" and space.describe(key) == "2 x 4"
        (query_heads, query_width), (key_heads, key_width) = space.leaves(query), space.leaves(key)
        assert query_width is key_width is space.find(width[0])
        assert list(space.leaves(heads)) == [query_heads, key_heads]

    def test_a_view_across_an_axis_pins_what_goes_in_and_what_comes_out(self, space: Space) -> None:
        a, b = n(space, 4), n(space, 9)
        result = space.reshape([a, b], [Size(6), Size(6)], "view in model")
        for dim in (a, b, *result):
            assert reasons(space, dim) == {"a view to 6 x 6 cuts across an axis (view in model)"}
        assert [size_of(dim) for dim in result] == [Size(6), Size(6)]

    def test_a_view_of_nothing_ends(self, space: Space) -> None:
        result = space.reshape([space.fresh(Size(0)), n(space, 4)], [Size(4), Size(0)], "view")
        assert [size_of(dim) for dim in result] == [Size(4), Size(0)]


class TestSlices:
    def test_pieces_share_the_leaves_of_the_whole(self, space: Space) -> None:
        whole = n(space, 12)
        left, right = space.slice(whole, 0, 5, "slice"), space.slice(whole, 5, 12, "slice")
        assert space.describe(whole) == "(5 + 7)"
        assert list(space.leaves(whole)) == [*left, *right]

    def test_pieces_that_overlap_are_refined(self, space: Space) -> None:
        whole = n(space, 12)
        first, second = space.slice(whole, 0, 8, "slice"), space.slice(whole, 4, 12, "slice")
        assert [leaf.size.coefficient for leaf in space.leaves(whole)] == [4, 4, 4]
        assert list(space.leaves(first))[1] is next(iter(space.leaves(second)))

    def test_the_whole_is_no_piece(self, space: Space) -> None:
        whole = n(space, 12)
        assert space.slice(whole, 0, 12, "slice") == whole and space.describe(whole) == "12"

    def test_an_empty_piece_leaves_the_whole_alone(self, space: Space) -> None:
        whole = n(space, 12)
        empty = space.slice(whole, 5, 5, "slice")
        assert size_of(empty) == Size(0) and space.describe(whole) == "12"
        assert space.cat([empty, whole]) == whole

    def test_empty_pieces_can_be_unified(self, space: Space) -> None:
        """Nothing times anything is nothing: no factor is learnt, however often it is asked."""
        empty, rest = space.fresh(Size(0)), space.fresh(Size(0))
        for _ in range(3):
            space.unify(empty, (*rest, *n(space, 4)), "add")
            space.unify(rest, empty, "add")
        assert size_of(space.flat(empty)) == Size(0)

    def test_a_product_is_cut_in_its_slow_factor(self, space: Space) -> None:
        """Of 6 heads of width 4, the first 8 channels are 2 heads."""
        whole = n(space, 6, 4)
        assert space.describe(space.slice(whole, 0, 8, "slice")) == "2 x 4"
        assert space.describe(whole) == "(2 + 4) x 4"

    def test_a_cut_inside_a_repeat_pins(self, space: Space) -> None:
        whole = n(space, 6, 4)
        piece = space.slice(whole, 0, 6, "slice in rope")
        space.settle()
        assert size_of(piece) == Size(6) and all(pinned(space, whole)) and all(pinned(space, piece))
        assert reasons(space, whole) == {"cut at 6, which is inside one of its repeats (slice in rope)"}

    def test_halves_that_change_places_are_one_axis(self, space: Space) -> None:
        """rotate_half of RoPE: x + cat(-x[d/2:], x[:d/2])."""
        head = n(space, 16)
        first, second = space.slice(head, 0, 8, "slice"), space.slice(head, 8, 16, "slice")
        space.unify(head, space.cat([second, first]), "add")
        a, b = space.leaves(head)
        assert a is b and not a.pins

    def test_halves_of_one_atom_are_pinned_together(self, space: Space) -> None:
        head = n(space, 16)
        first, second = space.slice(head, 0, 8, "slice"), space.slice(head, 8, 16, "slice")
        space.unify(head, space.cat([second, first]), "add")
        space.pin(first, "a table")
        assert space.describe(head) == "(8! + 8!)"

    def test_a_stride_is_a_product_with_a_pinned_fast_factor(self, space: Space) -> None:
        whole = n(space, 16)
        even, stride = space.interleaved(whole, 2, "slice")
        odd, _ = space.interleaved(whole, 2, "slice")
        assert space.describe(whole) == "8 x 2!" and space.flat(even) == space.flat(odd)
        assert reasons(space, stride) == {"read with step 2 (slice)"}

    def test_a_concatenation_of_one_is_that_one(self, space: Space) -> None:
        whole = n(space, 12)
        assert space.cat([whole]) == whole
        assert space.describe(space.cat([n(space, 1), n(space, 1)])) == "(1 + 1)"
