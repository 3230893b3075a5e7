"""Operators that contract axes: what they sum over is one axis of both operands, and every other axis passes through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers the operator that stands for grouped products in export)

from tests.compiler.toys import TOKENS, Toy, Traced, check, matters, trace

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def tokens(toy: Toy, x: torch.Tensor = X) -> Traced:
    """A toy that reads activations [batch, sequence, 6] of any batch and sequence."""
    return check(toy, x, dynamic=(TOKENS,))


class TestLinear:
    def test_input_weight_and_bias_share_their_axes(self) -> None:
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        traced = check(net, X, dynamic=(TOKENS,))
        assert traced.same(("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
        assert traced.same(("2.weight", 0), ("2.bias", 0), ("y", 2))
        assert traced.same(("0.weight", 1), ("x", 2))
        assert not traced.pins("0.weight", 0)

    def test_two_axes_of_one_size_are_not_confused(self) -> None:
        traced = tokens(Toy(lambda s, x: F.linear(F.linear(x, s.a), s.b), a=(6, 6), b=(6, 6)))
        assert traced.same(("a", 0), ("b", 1)) and not traced.same(("a", 0), ("a", 1))
        assert not traced.same(("b", 0), ("b", 1))

    def test_one_weight_read_twice_is_one_parameter(self) -> None:
        """A tied head: the vocabulary side and the hidden side keep apart, the hidden side closes."""
        traced = tokens(Toy(lambda s, x: F.linear(x @ s.w, s.w), w=(6, 8)))
        assert not traced.same(("w", 0), ("w", 1)) and traced.same(("w", 0), ("y", 2))

    def test_a_weight_times_itself_ties_its_axes(self) -> None:
        traced = tokens(Toy(lambda s, x: x @ (s.w @ s.w), w=(6, 6)))
        assert traced.same(("w", 0), ("w", 1), ("x", 2), ("y", 2))

    def test_who_reads_what_is_recorded(self) -> None:
        traced = tokens(
            Toy(lambda s, x: F.linear(F.linear(x, s.a).relu(), s.b.t().contiguous().t()), a=(8, 6), b=(4, 8))
        )
        names = [contraction.weight for contraction in traced.table.contractions]
        assert names == ["a", "b"]
        assert traced.table.contractions[1].value.target == torch.ops.aten.relu.default

    def test_a_width_of_one(self) -> None:
        traced = tokens(Toy(lambda s, x: F.linear(F.linear(x, s.a), s.b, s.c), a=(1, 6), b=(8, 1), c=(8,)))
        assert traced.describe("b") == ["8", "1"]


class TestProducts:
    def test_matmul_of_matrices_and_batches(self) -> None:
        traced = check(Toy(lambda s: s.a @ s.b, a=(3, 4, 5), b=(3, 5, 6)))
        assert traced.same(("a", 0), ("b", 0), ("y", 0)) and traced.same(("a", 2), ("b", 1))

    def test_a_batch_of_one_follows_the_other_operand(self) -> None:
        traced = check(Toy(lambda s: s.a @ s.b, a=(1, 4, 5), b=(3, 5, 6)))
        assert traced.describe("y") == ["3", "4", "6"]

    @pytest.mark.parametrize(
        "left, right, result",
        [((5,), (5,), []), ((4, 5), (5,), ["4"]), ((5,), (5, 6), ["6"]), ((5,), (3, 5, 2), ["3", "2"])],
    )
    def test_vectors(self, left: tuple[int, ...], right: tuple[int, ...], result: list[str]) -> None:
        traced = check(Toy(lambda s: s.a @ s.b, a=left, b=right))
        assert traced.describe("y") == result
        assert traced.same(("a", len(left) - 1), ("b", max(0, len(right) - 2)))

    def test_bmm_and_mm(self) -> None:
        traced = check(
            Toy(lambda s: torch.bmm(s.a, s.b) @ torch.mm(s.c, s.d), a=(3, 4, 5), b=(3, 5, 6), c=(6, 2), d=(2, 7))
        )
        assert traced.same(("b", 2), ("c", 0)) and traced.same(("c", 1), ("d", 0))

    def test_addmm_adds_a_bias_of_any_rank(self) -> None:
        toy = Toy(lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w, beta=0.5, alpha=2.0), b=(8,), w=(6, 8))
        traced = tokens(toy)
        assert traced.same(("w", 1), ("b", 0), ("y", 1))

    def test_baddbmm_shares_its_batch(self) -> None:
        traced = check(Toy(lambda s: torch.baddbmm(s.c, s.a, s.b), c=(1, 4, 5), a=(3, 4, 2), b=(3, 2, 5)))
        assert traced.same(("a", 0), ("b", 0), ("y", 0)) and traced.same(("c", 2), ("b", 2))

    def test_a_contraction_across_heads_is_a_contraction_of_their_product(self) -> None:
        """The output projection contracts what queries are split into."""
        toy = Toy(lambda s, x: (x @ s.q).unflatten(-1, (4, 2)).flatten(-2) @ s.o, q=(6, 8), o=(8, 6))
        assert tokens(toy).describe("o") == ["4 x 2", "6"]


class TestEinsum:
    def test_every_letter_is_one_axis(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.einsum("bsi,hid->bshd", x, s.w), w=(2, 6, 4)))
        assert traced.describe("y")[2:] == ["2", "4"]
        assert traced.same(("w", 1), ("x", 2))

    def test_a_letter_twice_in_one_term_is_a_diagonal(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.einsum("ii,bsi->bs", s.w, x), w=(6, 6)))
        assert traced.same(("w", 0), ("w", 1))

    def test_without_an_arrow_the_single_letters_come_out_in_order(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.einsum("zsi,ia", x, s.w), w=(6, 4)))
        assert traced.describe("y")[0] == "4" and not traced.pins("w", 1)

    def test_three_operands(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.einsum("bsi,ij,jk->bsk", x, s.v, s.w), v=(6, 8), w=(8, 5)))
        assert traced.same(("v", 1), ("w", 0)) and not traced.pins("v", 1)

    def test_a_size_of_one_broadcasts(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.einsum("bsi,hid->bshd", x, s.w), w=(2, 1, 4)), X[..., :1])
        assert traced.describe("w") == ["2", "1", "4"]

    def test_the_sequence_twice_is_the_sequence(self) -> None:
        """Heads that talk to each other: torch writes the number of keys of their scores as (s**2) // s."""

        def talk(s: Toy, x: torch.Tensor) -> torch.Tensor:
            q = torch.einsum("bsi,hid->bhsd", x, s.q)
            scores = torch.einsum("bhqd,bhkd->bhqk", q, q)
            return torch.einsum("bhqk,hg->bgqk", scores, s.w)

        traced = tokens(Toy(talk, q=(4, 6, 3), w=(4, 5)))
        assert traced.same(("q", 0), ("w", 0)) and traced.same(("y", 1), ("w", 1))
        assert traced.same(("y", 3), ("x", 1)) and not traced.pins("w", 0)

    def test_an_ellipsis_is_not_looked_into(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.einsum("...i,ij->...j", x, s.w), w=(6, 4)))
        assert "no rule" in traced.pins("w", 1)
        assert traced.table.unknown == {"einsum": [""]}


class TestConvolution:
    def test_a_filter_for_every_channel(self) -> None:
        """The short convolution of state-space and hybrid models, cut to the sequence behind its padding."""
        toy = Toy(
            lambda s, x: F.conv1d((x @ s.w).transpose(1, 2), s.k, s.b, padding=2, groups=8)[..., : x.shape[1]],
            w=(6, 8), k=(8, 1, 3), b=(8,),
        )  # fmt: skip
        traced = tokens(toy)
        assert traced.same(("w", 1), ("k", 0), ("b", 0), ("y", 1))
        assert not traced.pins("k", 0) and "offsets of a filter" in traced.pins("k", 2)
        assert matters(traced, "k", 2)

    def test_one_group_contracts_the_channels(self) -> None:
        traced = tokens(Toy(lambda s, x: F.conv1d(x.transpose(1, 2), s.k, padding=1), k=(8, 6, 3)))
        assert traced.describe("k") == ["8", "6", "3!"] and traced.same(("k", 0), ("y", 1))

    def test_groups_of_several_channels_are_not_looked_into(self) -> None:
        traced = tokens(Toy(lambda s, x: F.conv1d(x.transpose(1, 2), s.k, padding=1, groups=3), k=(9, 2, 3)))
        assert "no rule" in traced.pins("k", 0) and matters(traced, "k", 0)

    def test_a_length_that_is_a_width_is_pinned(self) -> None:
        traced = check(Toy(lambda s, x: F.conv1d((x @ s.w), s.k), w=(6, 8), k=(4, 5, 3)), X)
        assert "filtered along its order" in traced.pins("w", 1) and matters(traced, "w", 1)


class TestExperts:
    def test_grouped_products_contract_and_hold_their_experts(self) -> None:
        """Rows go to experts by their position: neither can change its order, the widths of every expert can."""
        offsets = torch.tensor([2, 3, 6], dtype=torch.int32)
        toy = Toy(lambda s: torch.ops.transformers.grouped_mm_fallback(s.rows, s.w, offsets), rows=(6, 4), w=(3, 4, 5))
        traced = check(toy)
        assert traced.describe("w") == ["3!", "4", "5"] and traced.same(("rows", 1), ("w", 1))
        assert "decides which expert" in traced.pins("rows", 0) and matters(traced, "rows", 0)
        assert matters(traced, "w", 0)


class TestAttention:
    def q_k_v(self, heads: int, groups: int, **options: object) -> Toy:
        def attention(s: Toy, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                (x @ weight).unflatten(-1, (count, -1)).transpose(1, 2)
                for weight, count in ((s.q, heads), (s.k, groups), (s.v, groups))
            )
            y = F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
            return y.transpose(1, 2).flatten(2) @ s.o

        return Toy(attention, q=(6, heads * 4), k=(6, groups * 4), v=(6, groups * 5), o=(heads * 5, 6))

    def test_multi_head(self) -> None:
        traced = tokens(self.q_k_v(3, 3, scale=0.5, is_causal=True))
        assert traced.describe("q") == traced.describe("k") == ["6", "3 x 4"]
        assert traced.describe("o") == ["3 x 5", "6"]
        assert traced.space.flat(traced.dims("q")[1])[0] is traced.space.flat(traced.dims("o")[0])[0]

    def test_grouped_queries_are_groups_of_broadcast_repeats(self) -> None:
        traced = tokens(self.q_k_v(6, 2, scale=0.5, enable_gqa=True))
        assert traced.describe("q") == ["6", "2 x 3 x 4"] and traced.describe("k") == ["6", "2 x 4"]
        assert traced.describe("v") == ["6", "2 x 5"] and traced.describe("o") == ["2 x 3 x 5", "6"]
        (site,) = traced.table.attentions
        assert traced.space.describe(site.heads) == "2 x 3" and traced.space.describe(site.value) == "5"

    def test_one_group_for_all_queries(self) -> None:
        traced = tokens(self.q_k_v(4, 1, scale=0.5, enable_gqa=True))
        assert traced.describe("q") == ["6", "4 x 4"] and traced.describe("v") == ["6", "5"]

    def test_a_scale_that_is_derived_pins_the_width_of_queries_and_keys(self) -> None:
        traced = tokens(self.q_k_v(3, 3))
        assert traced.describe("q") == ["6", "3 x 4!"] and traced.describe("o") == ["3 x 5", "6"]
        assert "the scale of attention is derived from it" in traced.pins("k", 1)

    def test_batches_that_are_widths_are_one_axis(self) -> None:
        shape = (3, 2, 4, 8)
        traced = check(Toy(lambda s: F.scaled_dot_product_attention(s.a, s.b, s.c), a=shape, b=shape, c=shape))
        assert traced.same(("a", 0), ("b", 0), ("c", 0)) and not traced.pins("a", 0)

    def test_positions_under_a_causal_mask_are_pinned(self) -> None:
        shape = (2, 4, 8)
        toy = Toy(lambda s: F.scaled_dot_product_attention(s.a, s.b, s.c, is_causal=True), a=shape, b=shape, c=shape)
        traced = check(toy)
        assert traced.describe("c") == ["2", "4!", "8"] and matters(traced, "a", 1)

    def test_without_a_mask_keys_have_no_order_but_their_softmax_is_noted(self) -> None:
        toy = Toy(lambda s: F.scaled_dot_product_attention(s.a, s.b, s.c), a=(2, 3, 8), b=(2, 4, 8), c=(2, 4, 8))
        traced = check(toy)
        assert not traced.pins("b", 1) and traced.notes("b", 1) == {"softmax"}

    def test_a_mask_belongs_to_heads_rows_and_columns(self) -> None:
        toy = Toy(
            lambda s: F.scaled_dot_product_attention(s.a, s.b, s.b, attn_mask=s.m),
            a=(1, 2, 3, 8), b=(1, 2, 4, 8), m=(2, 3, 4),
        )  # fmt: skip
        traced = check(toy)
        assert traced.same(("m", 0), ("a", 1)) and traced.same(("m", 1), ("a", 2)) and traced.same(("m", 2), ("b", 2))

    def test_attention_without_heads(self) -> None:
        toy = Toy(lambda s, x: F.scaled_dot_product_attention(x @ s.q, x @ s.k, x @ s.v), q=(6, 4), k=(6, 4), v=(6, 7))
        traced = tokens(toy)
        assert traced.describe("v") == ["6", "7"] and traced.table.attentions == []

    def test_attention_written_out_is_recognised(self) -> None:
        def eager(s: Toy, x: torch.Tensor) -> torch.Tensor:
            q, k, v = ((x @ w).unflatten(-1, (3, 4)).transpose(1, 2) for w in (s.q, s.k, s.v))
            weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2) @ s.o

        traced = tokens(Toy(eager, q=(6, 12), k=(6, 12), v=(6, 12), o=(12, 6)))
        (site,) = traced.table.attentions
        assert traced.space.describe(site.heads) == "3" and traced.space.describe(site.value) == "4"
        assert traced.describe("q") == ["6", "3 x 4"] and traced.describe("o") == ["3 x 4", "6"]

    def test_bmm_heads_cannot_be_told_apart_without_a_rule(self) -> None:
        """Ranks below three are not attention as the rule knows it."""
        toy = Toy(lambda s: F.scaled_dot_product_attention(s.a, s.b, s.b), a=(3, 8), b=(4, 8))
        assert "no rule" in trace(toy).pins("a", 0)
