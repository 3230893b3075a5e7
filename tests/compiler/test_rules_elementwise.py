"""Operators that treat every element alike, also in place; operators that make tensors; operators without a rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from minitron.compiler.axes.rules import RULES, elementwise
from tests.compiler.toys import TOKENS, Toy, Traced, check, matters, trace

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
aten = torch.ops.aten
Function = Callable[..., torch.Tensor]


def tokens(toy: Toy) -> Traced:
    return check(toy, X, dynamic=(TOKENS,))


UNARY = [
    "abs",
    "absolute",
    "atan",
    "ceil",
    "celu",
    "clone",
    "contiguous",
    "cos",
    "cosh",
    "detach",
    "elu",
    "erf",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "isfinite",
    "isinf",
    "isnan",
    "leaky_relu",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_sigmoid",
    "logical_not",
    "logit",
    "mish",
    "nan_to_num",
    "neg",
    "ones_like",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rsqrt",
    "selu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softplus",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "trunc",
    "zeros_like",
    "empty_like",
    "bitwise_not",
]
BINARY = [
    "add",
    "atan2",
    "div",
    "eq",
    "fmod",
    "ge",
    "gt",
    "le",
    "logaddexp",
    "logical_and",
    "logical_or",
    "logical_xor",
    "lt",
    "maximum",
    "minimum",
    "mul",
    "ne",
    "polar",
    "pow",
    "remainder",
    "sub",
    "xlogy",
    "rsub",
    "floor_divide",
    "copy",
    "type_as",
]
TRUTH = ["bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"]


def apply(name: str, *operands: torch.Tensor) -> torch.Tensor:
    """An operator by name, its result as finite real numbers."""
    if name in TRUTH or name == "bitwise_not":
        operands = tuple(operand > 0 for operand in operands)
    elif name == "polar":
        return torch.polar(*operands).real
    elif name == "empty_like":  # whatever stood in memory
        return torch.empty_like(*operands).zero_()
    return torch.nan_to_num(
        getattr(aten, name)(*operands).to(operands[0].dtype if name not in TRUTH else torch.float64)
    )


def test_operators_of_one_value_keep_its_axes() -> None:
    """All of them in one module: a single one that mixed two indices would be seen."""
    traced = tokens(Toy(lambda s, x: (lambda y: sum(apply(name, y).to(y.dtype) for name in UNARY))(x @ s.w), w=(6, 8)))
    assert traced.same(("w", 1), ("y", 2)) and not traced.pins("w", 1) and not traced.table.unknown


def test_operators_of_two_values_share_their_axes() -> None:
    def all_of(s: Toy, x: torch.Tensor) -> torch.Tensor:
        y, z = x @ s.w, s.v
        return sum(apply(name, y, z if name != "copy" else y * z).to(y.dtype) for name in (*BINARY, *TRUTH))

    traced = tokens(Toy(all_of, w=(6, 8), v=(8,)))
    assert traced.same(("w", 1), ("v", 0), ("y", 2)) and not traced.pins("v", 0) and not traced.table.unknown


def test_each_operator_of_two_values_alone_shares_their_axes() -> None:
    """Where one in the list above did not unify, another would have done so for it."""
    shared = [
        name
        for name in (*BINARY, *TRUTH)
        if name not in ("copy", "type_as")
        and trace(Toy(lambda s, x, name=name: apply(name, x @ s.w, s.v) * 1, w=(6, 8), v=(8,)), X).same(
            ("w", 1), ("v", 0)
        )
    ]
    assert shared == [name for name in (*BINARY, *TRUTH) if name not in ("copy", "type_as")]


THREE: dict[str, Function] = {
    "addcmul": lambda y, a, b: torch.addcmul(y, a, b),
    "addcdiv": lambda y, a, b: torch.addcdiv(y, a, b),
    "clamp": lambda y, a, b: y.clamp(a, b + 3),
    "clamp_min": lambda y, a, b: y.clamp_min(a) + y.clamp_max(b),
    "lerp": lambda y, a, b: torch.lerp(y, a.expand_as(y), b.expand_as(y)),
    "where": lambda y, a, b: torch.where(y > a, y, b),
    "where with numbers": lambda y, a, b: torch.where(y > a, y, 0.0) + torch.where(y > b, 1.0, y),
    "masked_fill": lambda y, a, b: y.masked_fill(a > 0, -1.0) * b,
    "masked_fill by a value": lambda y, a, b: y.masked_fill(a > b, torch.tensor(2.0, dtype=y.dtype)),
}


@pytest.mark.parametrize("name", THREE)
def test_operators_of_three_values_share_their_axes(name: str) -> None:
    traced = tokens(Toy(lambda s, x: THREE[name](x @ s.w, s.a, s.b), w=(6, 8), a=(8,), b=(8,)))
    assert traced.same(("w", 1), ("a", 0), ("b", 0)) and not traced.pins("a", 0)


class TestBroadcasting:
    def test_axes_are_aligned_at_the_last(self) -> None:
        traced = check(Toy(lambda s: s.a * s.b + s.c, a=(3, 4, 5), b=(4, 5), c=(5,)))
        assert traced.same(("a", 1), ("b", 0)) and traced.same(("a", 2), ("b", 1), ("c", 0))

    def test_sizes_of_one_follow(self) -> None:
        traced = check(Toy(lambda s: s.a * s.b, a=(3, 1), b=(1, 5)))
        assert traced.describe("y") == ["3", "5"] and traced.same(("b", 1), ("y", 1))

    def test_a_number_belongs_to_no_axis(self) -> None:
        traced = check(Toy(lambda s: s.a * s.b + 3 * s.a.sum(), a=(3, 4), b=()))
        assert not traced.pins("a", 0) and traced.describe("b") == []

    def test_a_mask_of_positions_pins_what_it_is_laid_over(self) -> None:
        """A triangle that was computed, filled into a weight."""
        mask = torch.ones(6, 8).tril().bool()
        traced = tokens(Toy(lambda s, x: x @ s.w.masked_fill(mask, 0.0), w=(6, 8)))
        assert traced.pins("w", 0) and matters(traced, "w", 0) and matters(traced, "w", 1)

    @pytest.mark.parametrize("shape", [(4,), (8, 8), (3, 5, 6, 8, 9)])
    def test_a_value_that_only_lends_its_number_format_lends_no_axis(self, shape: tuple[int, ...]) -> None:
        for like in (lambda y, v: y.type_as(v), lambda y, v: y.to(v)):
            traced = tokens(Toy(lambda s, x, like=like: like(x @ s.w, s.v) * 1, w=(6, 8), v=shape))
            assert not traced.pins("w", 1) and not any(traced.pins("v", axis) for axis in range(len(shape)))

    def test_casts_and_dropout_change_no_axis(self) -> None:
        toy = Toy(lambda s, x: F.dropout((x @ s.w).to(torch.float32).double(), 0.5, training=False), w=(6, 8))
        assert tokens(toy).same(("w", 1), ("y", 2))


class TestInPlace:
    """What is written into a piece of a value belongs to that piece, however it was cut."""

    def piecewise(self, write: Function, **shapes: tuple[int, ...]) -> Traced:
        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            y = x @ s.w
            write(y, s.v)
            return y * 1

        return check(Toy(forward, w=(6, 8), **shapes), X)

    @pytest.mark.parametrize(
        "write",
        [
            lambda y, v: y[..., :3].mul_(v),
            lambda y, v: y[..., :3].add_(v),
            lambda y, v: y[..., :3].copy_(v),
            lambda y, v: y.split([3, 5], -1)[0].sub_(v),
            lambda y, v: y.narrow(-1, 0, 3).div_(v),
        ],
    )
    def test_a_piece_of_a_value_is_written(self, write: Function) -> None:
        traced = self.piecewise(write, v=(3,))
        first, second = traced.space.leaves(traced.dims("w")[1])
        assert first is traced.leaf("v", 0) and second.size.coefficient == 5 and not first.pins

    def test_a_piece_is_set_to_a_number(self) -> None:
        def write(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            y[..., :3].fill_(1.0)
            y[..., 3:5].zero_()
            return y[..., 5:].masked_fill_(v > 0, 2.0).clamp_(max=1.5)

        traced = self.piecewise(write, v=(3,))
        assert [leaf.size.coefficient for leaf in traced.space.leaves(traced.dims("w")[1])] == [3, 2, 3]
        assert not traced.pins("w", 1)

    def test_one_index_is_written(self) -> None:
        traced = self.piecewise(lambda y, v: y[..., 0].fill_(1.0), v=(3,))
        assert "one index of it is taken" in traced.pins("w", 1) and matters(traced, "w", 1)

    def test_a_value_is_written_into_zeros(self) -> None:
        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            z = torch.zeros(2, 5, 8, dtype=x.dtype)
            z[..., 2:6] = (x @ s.w)[..., :4]
            return z @ s.v

        traced = check(Toy(forward, w=(6, 8), v=(8, 3)), X)
        kept = list(traced.space.leaves(traced.dims("v")[0]))
        assert next(iter(traced.space.leaves(traced.dims("w")[1]))) is kept[1] and not traced.pins("w", 1)

    def test_activations_in_place(self) -> None:
        traced = self.piecewise(lambda y, v: y.relu_().sigmoid_().tanh_().neg_().mul_(v), v=(8,))
        assert traced.same(("w", 1), ("v", 0))


class TestFactories:
    def test_uniform_tensors_fit_any_width(self) -> None:
        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            y = x @ s.w
            return y + y.new_zeros(8) + y.new_ones(8) + y.new_full((8,), 2.0) + torch.full((8,), 3) + torch.ones(1, 8)

        traced = tokens(Toy(forward, w=(6, 8)))
        assert not traced.pins("w", 1)

    def test_a_number_as_a_tensor(self) -> None:
        traced = tokens(Toy(lambda s, x: torch.where(x @ s.w > 0, torch.scalar_tensor(2.0), 1.0), w=(6, 8)))
        assert not traced.pins("w", 1)

    def test_tables_that_a_model_computes_are_pinned(self) -> None:
        toy = Toy(lambda s, x: (x @ s.w) * s.table, w=(6, 8))
        toy.register_buffer("table", torch.arange(8.0), persistent=False)
        traced = tokens(toy)
        assert traced.pins("w", 1) == "a buffer that the model's code computes when it is loaded (table)"
        assert matters(traced, "w", 1)

    def test_an_identity_matrix_is_pinned(self) -> None:
        traced = tokens(Toy(lambda s, x: x @ (s.w + torch.eye(6)), w=(6, 6)))
        assert traced.pins("w", 0) and matters(traced, "w", 0)


# -- no rule ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("toys::reversed", mutates_args=())
def reversed_(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).clone()


@reversed_.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("toys::both", mutates_args=())
def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.flip(-1).clone(), x.clone()


@both.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


class Named(torch.nn.Module):
    """A module whose path a user would look for."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Toy(lambda s, x: torch.ops.toys.reversed(x @ s.w) @ s.v, w=(6, 8), v=(8, 3))
        self.out = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mixer(x))  # type: ignore[no-any-return]


class TestUnknown:
    def test_an_operator_without_a_rule_pins_what_goes_in_and_what_comes_out(self) -> None:
        traced = check(Named(), X, dynamic=(TOKENS,))
        assert traced.table.unknown == {"reversed": ["mixer"]}
        reason = "the analysis has no rule for this operator (reversed in mixer)"
        assert traced.pins("mixer.w", 1) == traced.pins("mixer.v", 0) == reason
        assert matters(traced, "mixer.w", 1)
        assert not traced.pins("mixer.v", 1) and not traced.pins("mixer.w", 0)

    def test_an_operator_with_several_results(self) -> None:
        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            a, b = torch.ops.toys.both(x @ s.w)
            return a @ s.u + b @ s.v

        traced = tokens(Toy(forward, w=(6, 8), u=(8, 3), v=(8, 3)))
        for name, axis in (("w", 1), ("u", 0), ("v", 0)):
            assert "no rule" in traced.pins(name, axis)
        assert not traced.pins("u", 1)

    def test_a_part_that_export_puts_into_a_sub_graph_is_not_looked_into(self) -> None:
        """It does so where a model switches gradients on or off."""

        def forward(s: Toy, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                y = (x @ s.w).cos()
            return y @ s.v

        traced = trace(Toy(forward, w=(6, 8), v=(8, 3)), X)
        assert list(traced.table.unknown) == ["wrap_with_set_grad_enabled"]
        assert traced.pins("w", 1) and traced.pins("v", 0) and not traced.pins("v", 1)

    def test_every_rule_is_for_an_operator(self) -> None:
        assert all(isinstance(target, torch._ops.OpOverload) for target in RULES)
        assert {RULES[aten.add.Tensor], RULES[aten.where.self]} == {elementwise.elementwise}
        assert aten.where.default not in RULES
