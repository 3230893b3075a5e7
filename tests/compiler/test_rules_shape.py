"""Operators that move, split and join dimensions. Each module is also tried: see `toys.check`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.compiler.toys import BATCH, TOKENS, Toy, Traced, check, matters

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def tokens(toy: Toy, x: torch.Tensor = X) -> Traced:
    return check(toy, x, dynamic=(TOKENS,))


class TestViews:
    def test_heads_are_split_off_and_put_back(self) -> None:
        """Whatever operator it is done with."""
        ways = {
            "view": lambda y: y.view(*y.shape[:-1], 2, 4).view(*y.shape[:-1], 8),
            "reshape": lambda y: y.reshape(*y.shape[:-1], 2, -1).reshape(*y.shape[:-1], -1),
            "flatten": lambda y: y.unflatten(-1, (2, 4)).flatten(-2),
            "view_as": lambda y: y.unflatten(-1, (2, 4)).view_as(y),
            "reshape_as": lambda y: y.unflatten(-1, (2, 4)).reshape_as(y),
        }
        for way in ways.values():
            traced = tokens(Toy(lambda s, x, way=way: way(x @ s.w) @ s.v, w=(6, 8), v=(8, 3)))
            assert traced.describe("w") == ["6", "2 x 4"] and traced.describe("v") == ["2 x 4", "3"]
            assert traced.same(("w", 1), ("v", 0))

    def test_batch_and_sequence_may_be_flattened(self) -> None:
        traced = tokens(Toy(lambda s, x: (x.flatten(0, 1) @ s.w).view(x.shape[0], x.shape[1], 8), w=(6, 8)))
        assert traced.same(("w", 1), ("y", 2)) and not traced.pins("w", 1)

    def test_a_view_across_an_axis_pins_it(self) -> None:
        toy = Toy(lambda s, x: (lambda y: y.unflatten(-1, (2, 3)).mT.flatten(-2) + y)(x @ s.w), w=(6, 6))
        traced = tokens(toy)
        assert "do not match" in traced.pins("w", 1) and matters_somewhere(traced, "w", 1)

    def test_factors_that_change_places_are_one_axis(self) -> None:
        """y + yᵀ of a square: both factors are permuted alike."""
        toy = Toy(lambda s, x: (lambda y: y.unflatten(-1, (3, 3)).mT.flatten(-2) + y)(x @ s.w), w=(6, 9))
        traced = tokens(toy)
        slow, fast = traced.space.leaves(traced.dims("w")[1])
        assert slow is fast and not slow.pins

    def test_complex_pairs_are_pinned(self) -> None:
        """Rotary embeddings in complex numbers: the pair of a channel stays together, frequencies may change places."""

        def rotate(s: Toy, x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex((x @ s.w).unflatten(-1, (4, 2)))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(s.f), s.f)).flatten(-2)

        traced = tokens(Toy(rotate, w=(6, 8), f=(4,)))
        assert traced.describe("w") == ["6", "4 x 2!"] and "imaginary" in traced.pins("w", 1)


def matters_somewhere(traced: Traced, name: str, axis: int) -> bool:
    """Of an axis that has been taken apart: shifting all of it is noticed."""
    value = traced.parameters()[name]
    rolled = {**traced.parameters(), name: value.roll(1, axis)}
    with torch.no_grad():
        before = traced.module(*traced.inputs)
        after = torch.func.functional_call(traced.module, rolled, traced.inputs)
    return not torch.allclose(before, after)


class TestOrder:
    @pytest.mark.parametrize(
        "move, order",
        [
            (lambda w: w.transpose(0, -1), "4 3 2"),
            (lambda w: w.swapaxes(0, 1), "3 2 4"),
            (lambda w: w.swapdims(-2, -1), "2 4 3"),
            (lambda w: w.permute(2, 0, 1), "4 2 3"),
            (lambda w: w.permute(-1, 0, 1), "4 2 3"),
            (lambda w: w.movedim(0, -1), "3 4 2"),
            (lambda w: w.movedim((0, 1), (2, 0)), "3 4 2"),
            (lambda w: w.mT, "2 4 3"),
            (lambda w: w.unsqueeze(1).squeeze(1), "2 3 4"),
            (lambda w: w.unsqueeze(-1), "2 3 4 1"),
            (lambda w: w[None].squeeze(), "2 3 4"),
            (lambda w: w[:, None, :, None].squeeze((1, 3)), "2 3 4"),
            (lambda w: w.squeeze(1), "2 3 4"),
        ],
    )
    def test_dimensions_move_as_torch_moves_them(self, move: object, order: str) -> None:
        traced = check(Toy(lambda s: move(s.w) * 1, w=(2, 3, 4)))  # type: ignore[operator]
        assert " ".join(traced.describe("y")) == order
        assert not any(traced.pins("w", axis) for axis in range(3))

    def test_t_turns_a_matrix_and_leaves_a_vector(self) -> None:
        assert check(Toy(lambda s: s.w.t() * 1, w=(2, 3))).describe("y") == ["3", "2"]
        assert check(Toy(lambda s: s.w.t() * 1, w=(3,))).describe("y") == ["3"]

    def test_numpy_t_turns_all_dimensions_around(self) -> None:
        traced = check(Toy(lambda s: torch.ops.aten.numpy_T(s.w) * 1, w=(3, 4, 3)))
        assert traced.same(("w", 0), ("y", 2)) and traced.same(("w", 2), ("y", 0))


class TestRepeats:
    def test_an_axis_that_only_repeats_is_broadcast(self) -> None:
        """repeat_kv: groups are expanded, then flattened with their repeats."""
        toy = Toy(lambda s, x: (x @ s.w).unsqueeze(2).expand(-1, -1, 3, -1).flatten(2) @ s.v, w=(6, 4), v=(12, 5))
        traced = tokens(toy)
        assert traced.describe("v") == ["3 x 4", "5"]
        assert traced.space.flat(traced.dims("v")[0])[1] is traced.leaf("w", 1)

    @pytest.mark.parametrize(
        "write_out, wanted",
        [
            (lambda y: y.repeat_interleave(3, -1), "4 x 3"),
            (lambda y: y.repeat(1, 1, 3), "3 x 4"),
            (lambda y: y.tile(3), "3 x 4"),
            (lambda y: y.tile((1, 1, 3)), "3 x 4"),
        ],
    )
    def test_repeating_makes_a_product(self, write_out: object, wanted: str) -> None:
        toy = Toy(lambda s, x: write_out(x @ s.w) @ s.v, w=(6, 4), v=(12, 5))  # type: ignore[operator]
        traced = tokens(toy)
        assert traced.describe("v") == [wanted, "5"] and traced.leaf("w", 1) in traced.space.leaves(traced.dims("v")[0])

    def test_repeats_that_a_tensor_counts_are_not_looked_into(self) -> None:
        counts = torch.tensor([1, 2, 1, 2])
        toy = Toy(lambda s, x: (x @ s.w).repeat_interleave(counts, -1, output_size=6) @ s.v, w=(6, 4), v=(6, 5))
        assert "no rule" in tokens(toy).pins("w", 1)

    def test_a_repeated_row(self) -> None:
        traced = tokens(Toy(lambda s, x: x + s.w.repeat(x.shape[0], 1, 1), w=(1, 6)))
        assert traced.same(("w", 1), ("x", 2))

    def test_expand_as_takes_the_axes_of_the_other(self) -> None:
        """Else a width that is narrowed on one side would stay whole on the other."""
        traced = tokens(Toy(lambda s, x: s.b.expand_as(x @ s.w) * (x @ s.v), w=(6, 8), v=(6, 8), b=(1,)))
        assert traced.same(("w", 1), ("v", 1), ("y", 2))

    def test_expanding_to_a_batch_makes_no_width(self) -> None:
        traced = tokens(Toy(lambda s, x: s.w.unsqueeze(0).expand(x.shape[0], -1, -1) @ x.transpose(1, 2), w=(4, 6)))
        assert traced.same(("w", 0), ("y", 1)) and traced.same(("w", 1), ("x", 2))


class TestSlices:
    def test_pieces_stay_parts_of_the_whole(self) -> None:
        toy = Toy(lambda s, x: (lambda y: y[..., :3] @ s.a + y[..., 3:] @ s.b)(x @ s.w), w=(6, 8), a=(3, 4), b=(5, 4))
        traced = tokens(toy)
        assert traced.describe("w") == ["6", "(3 + 5)"] and not traced.pins("w", 1)

    @pytest.mark.parametrize("bounds", [slice(-3, None), slice(5, 99), slice(-3, 8), slice(5, 9223372036854775807)])
    def test_bounds_are_read_as_python_reads_them(self, bounds: slice) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[..., bounds] @ s.a, w=(6, 8), a=(3, 4)))
        assert traced.describe("w") == ["6", "(5 + 3)"]

    def test_an_empty_slice_is_no_axis(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.cat([(x @ s.w)[..., 5:2], x @ s.w], -1), w=(6, 8)))
        assert traced.describe("w") == ["6", "8"]

    def test_narrow_is_a_slice(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w).narrow(-1, 2, 3) @ s.a, w=(6, 8), a=(3, 4)))
        assert [leaf.size.coefficient for leaf in traced.space.leaves(traced.dims("w")[1])] == [2, 3, 3]
        assert traced.leaf("a", 0) is list(traced.space.leaves(traced.dims("w")[1]))[1]

    def test_even_and_odd_channels_are_one_axis(self) -> None:
        traced = tokens(Toy(lambda s, x: (lambda y: (y[..., ::2] * y[..., 1::2]) @ s.v)(x @ s.w), w=(6, 8), v=(4, 3)))
        assert traced.describe("w") == ["6", "4 x 2!"] and "read with step 2" in traced.pins("w", 1)
        assert traced.leaf("v", 0) in traced.space.leaves(traced.dims("w")[1])

    @pytest.mark.parametrize("bounds", [slice(3, None, 2), slice(None, 6, 2), slice(2, 7, 3)])
    def test_a_stride_over_a_part_is_pinned(self, bounds: slice) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[..., bounds] * 1, w=(6, 8)))
        assert "takes only a part of it" in traced.pins("w", 1) and matters(traced, "w", 1)

    def test_a_stride_that_does_not_divide_is_pinned(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[..., ::2] * 1, w=(6, 7)))
        assert "step 2" in traced.pins("w", 1) and matters(traced, "w", 1)

    def test_a_table_cut_to_the_length_of_the_sequence_is_pinned_along_it(self) -> None:
        """Learned positions: rows have their order, channels have none."""
        tokens_of_16 = {0: BATCH, 1: torch.export.Dim("sequence", min=1, max=16)}
        traced = check(Toy(lambda s, x: x + s.p[: x.shape[1]], p=(17, 6)), X, dynamic=(tokens_of_16,))
        assert "a position that is not fixed" in traced.pins("p", 0) and not traced.pins("p", 1)
        assert matters(traced, "p", 0)

    def test_a_width_within_a_cut_batch_is_pinned(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w).flatten(1)[:, 3:] * 1, w=(6, 8)))
        assert traced.pins("w", 1) and matters(traced, "w", 1)

    def test_cutting_the_sequence_alone_pins_no_width(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[:, -1:] @ s.v, w=(6, 8), v=(8, 3)))
        assert not traced.pins("w", 1) and not traced.pins("v", 0)

    @pytest.mark.parametrize(
        "cut",
        [
            lambda y: y.split(4, -1),
            lambda y: y.chunk(3, -1),
            lambda y: y.split_with_sizes([4, 4, 4], -1),
            lambda y: torch.split(y, [4, 4, 4], dim=2),
        ],
    )
    def test_a_fused_projection_that_is_cut(self, cut: object) -> None:
        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            a, b, c = cut(x @ s.w)  # type: ignore[operator]
            return F.silu(a) * b @ s.v + c @ s.u

        traced = tokens(Toy(forward, w=(6, 12), v=(4, 3), u=(4, 3)))
        first, second, third = traced.space.leaves(traced.dims("w")[1])
        assert first is second is traced.leaf("v", 0) and third is traced.leaf("u", 0) and not first.pins

    def test_halves_of_a_gate(self) -> None:
        traced = tokens(Toy(lambda s, x: F.glu(x @ s.w) @ s.v, w=(6, 8), v=(4, 3)))
        first, second = traced.space.leaves(traced.dims("w")[1])
        assert first is second is traced.leaf("v", 0) and not first.pins

    def test_query_key_and_value_of_every_head_side_by_side(self) -> None:
        """GPT-NeoX: [heads, 3, width] in one projection."""

        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (piece.transpose(1, 2) for piece in (x @ s.w).unflatten(-1, (4, 6)).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2) @ s.o

        traced = tokens(Toy(forward, w=(6, 24), o=(8, 6)))
        assert traced.describe("w")[1].startswith("4 x (2 + 2 + 2)")
        assert traced.describe("o") == ["4 x 2", "6"]

    def test_one_index_or_all_indices_one_by_one(self) -> None:
        traced = tokens(Toy(lambda s, x: (x @ s.w)[..., 3], w=(6, 8)))
        assert "one index of it is taken" in traced.pins("w", 1) and matters(traced, "w", 1)
        toy = Toy(
            lambda s, x: torch.stack((x @ s.w).unflatten(-1, (2, 4)).unbind(-2)[::-1], -1) @ s.v, w=(6, 8), v=(2, 3)
        )
        traced = tokens(toy)
        assert traced.describe("w") == ["6", "2! x 4"] and "index by index" in traced.pins("w", 1)
        assert "a stack of separate values" in traced.pins("v", 0)


class TestJoins:
    def test_pieces_in_another_order_are_the_same_pieces(self) -> None:
        def swap(y: torch.Tensor) -> torch.Tensor:
            return torch.cat([y[..., 2:5], y[..., :2], y[..., 5:]], -1)

        traced = tokens(Toy(lambda s, x: swap(x @ s.w) @ s.v, w=(6, 8), v=(8, 3)))
        assert traced.describe("w")[1] == "(2 + 3 + 3)" and traced.describe("v")[0] == "(3 + 2 + 3)"
        assert not traced.pins("w", 1)

    def test_halves_that_are_rotated_into_each_other_are_one(self) -> None:
        def rotated(y: torch.Tensor) -> torch.Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([-b, a], -1)

        traced = tokens(Toy(lambda s, x: (lambda y: y + rotated(y))(x @ s.w), w=(6, 8)))
        a, b = traced.space.leaves(traced.dims("w")[1])
        assert a is b and not a.pins

    def test_empty_vectors_may_stand_among_the_pieces(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.cat([torch.zeros(0, dtype=x.dtype), x @ s.w], -1), w=(6, 8)))
        assert traced.same(("w", 1), ("y", 2))

    def test_other_axes_of_the_pieces_are_shared(self) -> None:
        traced = check(Toy(lambda s: torch.cat([s.a, s.b], 0), a=(3, 6), b=(4, 6)))
        assert traced.same(("a", 1), ("b", 1)) and traced.describe("y") == ["(3 + 4)", "6"]

    def test_a_width_joined_with_the_sequence_is_pinned(self) -> None:
        """Prefix tokens: the sequence has no fixed size, so nothing says where they stand."""
        toy = Toy(lambda s, x: torch.cat([s.w.expand(x.shape[0], -1, -1), x], 1), w=(4, 6))
        traced = tokens(toy)
        assert "no fixed size" in traced.pins("w", 0) and matters(traced, "w", 0)
        assert traced.same(("w", 1), ("x", 2)) and not traced.pins("w", 1)

    def test_stacking_shares_every_axis_and_pins_the_new_one(self) -> None:
        traced = check(Toy(lambda s: torch.stack([s.a, s.b], 1), a=(3, 6), b=(3, 6)))
        assert traced.same(("a", 0), ("b", 0)) and traced.describe("y") == ["3", "2!", "6"]

    def test_padding_pins_the_axis_that_is_padded(self) -> None:
        traced = tokens(Toy(lambda s, x: F.pad(x @ s.w, (1, 0)), w=(6, 8)))
        assert "padded at its ends" in traced.pins("w", 1) and matters(traced, "w", 1)
        traced = tokens(Toy(lambda s, x: F.pad(x @ s.w, (0, 0, 1, 0)), w=(6, 8)))
        assert not traced.pins("w", 1)


def test_triangles_are_decided_by_position() -> None:
    for cut in (torch.tril, torch.triu):
        traced = tokens(Toy(lambda s, x, cut=cut: x @ cut(s.w), w=(6, 6)))
        assert "triangular mask" in traced.pins("w", 0) and matters(traced, "w", 0) and matters(traced, "w", 1)
