"""Layers that do the same are captured once, and nobody can see it: the graph is that of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from minitron.compiler.axes.analysis import analyse
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture import capture as capture_module
from minitron.compiler.capture.capture import Captured, capture
from minitron.compiler.capture.layer_kinds import Accounts, accounts
from minitron.compiler.plan import prove
from minitron.compiler.plan.plan import make_plan
from minitron.compiler.plan_document import plan_document
from minitron.compiler.roles.roles import Roles, find_roles
from tests.compiler.families import config
from tests.foundry import Foundry

TWO_KINDS = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "use_sliding_window": True,
}


def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every export from now on."""
    seen: list[int] = []
    export = capture_module._export

    def counted(config: Any, dtype: torch.dtype, attention: str, length: int | None) -> Any:
        seen.append(config.num_hidden_layers)
        return export(config, dtype, attention, length)

    monkeypatch.setattr(capture_module, "_export", counted)
    return seen


def whole_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_export_once", lambda *_: None)


def spelled(captured: Captured) -> list[Any]:
    """Every node with operands by their places in the graph: names are numbered by whoever builds a graph."""
    places = {node: place for place, node in enumerate(captured.graph.nodes)}

    def shape(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [shape(one) for one in value]
        return ([str(size) for size in value.shape], value.dtype) if isinstance(value, torch.Tensor) else type(value)

    def one(node: Node) -> Any:
        operands = repr(map_arg((node.args, node.kwargs), lambda operand: places[operand]))
        return (node.op, str(node.target), operands, shape(node.meta.get("val")), captured.module_of(node))

    return [one(node) for node in captured.graph.nodes]


def described(table: AxisTable) -> dict[str, list[str]]:
    return {name: [table.space.describe(dim) for dim in dims] for name, dims in table.parameters.items()}


def test_the_graph_is_that_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = config("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1, 4])
    seen = exports(monkeypatch)
    once = capture(experts)
    assert seen == [3]  # the first layer, and one of each kind: with experts and without
    whole_capture(monkeypatch)
    whole = capture(experts)
    assert spelled(once) == spelled(whole)
    assert once.canonical == whole.canonical
    assert set(once.graph_module.state_dict()) == set(whole.graph_module.state_dict())
    tables = analyse(once), analyse(whole)
    assert described(tables[0]) == described(tables[1])
    roles = find_roles(once, tables[0]), find_roles(whole, tables[1])
    assert width_sizes(roles[0]) == width_sizes(roles[1])


def width_sizes(roles: Roles) -> dict[str, dict[int, int]]:
    return {name: {layer: width.size for layer, width in layers.items()} for name, layers in roles.widths.items()}


def test_a_plan_that_drops_layers_is_the_same(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = foundry.teacher("qwen3", num_hidden_layers=6, **TWO_KINDS)
    loaded = foundry.load(teacher, {"hidden_size": 24, "num_attention_heads": 2, "layers": {"drop": [1, 2]}})
    # What compares the numbers in the graphs captures other models, of few layers.
    monkeypatch.setattr(prove, "compare_constants", lambda *_: None)
    seen = exports(monkeypatch)
    documents = [plan_document(make_plan(loaded, build=foundry.root / "once"))]
    assert 6 not in seen
    whole_capture(monkeypatch)
    documents.append(plan_document(make_plan(loaded, build=foundry.root / "once")))
    assert 6 in seen
    assert documents[0] == documents[1]


class Layer(torch.nn.Module):
    """Adds what it is told to add, after its own weight."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return sum(others, x * self.weight * self.factor)


class Chain(torch.nn.Module):
    """`reads(i, values)` are the values beside the last one that layer i reads."""

    def __init__(self, layers: list[Layer], reads: Callable[[int, list[torch.Tensor]], list[torch.Tensor]]) -> None:
        super().__init__()
        self.layers, self.reads = torch.nn.ModuleList(layers), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for number, layer in enumerate(self.layers):
            values.append(layer(values[-1], *self.reads(number, values)))
        return values[-1]


def account(
    layers: list[Layer], reads: Callable[[int, list[torch.Tensor]], list[torch.Tensor]] = lambda *_: []
) -> Accounts | None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        chain = Chain(layers, reads)
        for layer in layers:
            layer.weight = torch.nn.Parameter(torch.ones(4))
        return accounts(chain, "layers", chain, torch.ones(4))


class TestAccounts:
    def test_layers_that_do_the_same_have_the_same_account(self) -> None:
        told = account([Layer(), Layer(), Layer(), Layer(2.0)])
        assert told is not None
        assert told.layers[1] == told.layers[2] != told.layers[3]

    def test_what_comes_from_outside_is_told_from_what_the_layer_before_made(self) -> None:
        told = account([Layer() for _ in range(4)], lambda number, values: [values[0 if number == 2 else -1]])
        assert told is not None and told.layers[1] == told.layers[3] != told.layers[2]

    @pytest.mark.parametrize(
        ("reads", "what"),
        [
            (lambda number, values: values[1:2] if number == 3 else [], "a layer reads what a distant one made"),
            (lambda number, values: [values[-1] + 1], "something is computed between the layers"),
        ],
    )
    def test_what_is_no_chain_is_not_told(self, reads: Any, what: str) -> None:
        assert account([Layer() for _ in range(4)], reads) is None, what

    def test_a_layer_that_is_run_twice(self) -> None:
        shared = Layer()
        assert account([shared, shared, Layer()]) is None


def test_a_scale_that_follows_the_layers_number_is_captured_whole() -> None:
    changed = config("gpt2", n_layer=4, num_hidden_layers=4, scale_attn_by_inverse_layer_idx=True)
    assert capture_module._export_once(changed, torch.float32, "eager", None) is None
