"""The graph passes: what each leaves behind, and that its postcondition notices when it has not done its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from minitron.compiler import Plan
from minitron.compiler.graph.graph_module import attribute, set_attribute
from minitron.compiler.importance.select import leading, narrowing_of
from minitron.compiler.rewrite import Pass, PassFailed, run_passes
from minitron.compiler.rewrite.drop_layers import drop_layers
from minitron.compiler.rewrite.narrow_parameters import narrow_parameters
from minitron.compiler.rewrite.shape_constants import shape_constants
from tests.foundry import Foundry
from tests.models import FAMILIES

aten = torch.ops.aten
SMALLER = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def passes_of(plan: Plan, kept: Sequence[int] = (0, 2)) -> dict[str, Pass]:
    """The passes of a compile that keeps the first indices of everything."""
    narrowing = narrowing_of(leading(plan.targets, plan.teacher.roles), plan.teacher.roles, plan.teacher.table)
    dims = {node.name: dims for node, dims in plan.teacher.table.nodes.items()}
    made = (
        drop_layers(plan.teacher.captured, plan.teacher.ends, kept),
        narrow_parameters(dims, narrowing),
        shape_constants(dims, narrowing),
    )
    return {one.name: one for one in made}


@pytest.fixture
def plan(foundry: Foundry) -> Plan:
    return foundry.plan(foundry.teacher("llama"), SMALLER)


def text(graph_module: GraphModule) -> str:
    return str(graph_module.graph) + str({n: p.shape for n, p in graph_module.named_parameters()})


@pytest.mark.parametrize("name", ["drop_layers", "narrow_parameters", "shape_constants"])
def test_a_pass_that_does_nothing_fails_its_own_postcondition(plan: Plan, name: str) -> None:
    passes = passes_of(plan)
    passes[name] = replace(passes[name], run=lambda graph_module: None)
    with pytest.raises(PassFailed, match=f"pass {name}: "):
        run_passes(plan.teacher.captured.graph_module, list(passes.values()))


def after(one: Pass, spoil: Callable[[GraphModule], Any]) -> Pass:
    """A pass that does its work and then something wrong."""

    def run(graph_module: GraphModule) -> None:
        one.run(graph_module)
        spoil(graph_module)

    return replace(one, run=run)


def test_a_parameter_that_was_forgotten_is_noticed(plan: Plan) -> None:
    def widen(graph_module: GraphModule) -> None:
        node = next(n for n in graph_module.graph.nodes if "layers.1.mlp.up_proj" in str(n.target))
        set_attribute(graph_module, str(node.target), torch.empty(40, 24, device="meta"))

    passes = passes_of(plan)
    passes["narrow_parameters"] = after(passes["narrow_parameters"], widen)
    with pytest.raises(PassFailed, match=r"pass narrow_parameters: .*up_proj.weight is \(40, 24\), not \(24, 24\)"):
        run_passes(plan.teacher.captured.graph_module, list(passes.values()))


def test_a_size_that_still_runs_but_is_wrong_is_noticed(plan: Plan) -> None:
    """A view that swaps two sizes is no error to torch."""

    def swap(graph_module: GraphModule) -> None:
        node = next(n for n in graph_module.graph.nodes if n.target is aten.reshape.default and len(n.args[1]) == 4)
        sizes = list(node.args[1])
        assert sizes[2:] == [-1, 8]
        node.update_arg(1, [*sizes[:2], 8, -1])

    passes = passes_of(plan)
    passes["shape_constants"] = after(passes["shape_constants"], swap)
    with pytest.raises(PassFailed, match=r"pass shape_constants: dimension 2 of view.* is 8, the analysis says 2"):
        run_passes(plan.teacher.captured.graph_module, list(passes.values()))


def test_a_layer_too_many_dropped_is_noticed(plan: Plan) -> None:
    with pytest.raises(PassFailed, match="pass drop_layers: 1 layers are left, not 2"):
        run_passes(
            plan.teacher.captured.graph_module,
            [
                replace(
                    drop_layers(plan.teacher.captured, plan.teacher.ends, (0,)),
                    ensures=passes_of(plan)["drop_layers"].ensures,
                )
            ],
        )


def test_the_graph_that_is_given_stays_as_it_is(plan: Plan) -> None:
    before = text(plan.teacher.captured.graph_module)
    run_passes(plan.teacher.captured.graph_module, list(passes_of(plan).values()))
    assert text(plan.teacher.captured.graph_module) == before


def test_where_nothing_is_narrowed_nothing_is_rewritten(foundry: Foundry) -> None:
    whole = foundry.whole("llama")
    graph_module = run_passes(whole.teacher.captured.graph_module, list(passes_of(whole, range(3)).values()))
    assert text(graph_module) == text(whole.teacher.captured.graph_module)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_layer_leaves_nothing_behind(foundry: Foundry, family: str) -> None:
    whole = foundry.whole(family)
    graph_module = run_passes(whole.teacher.captured.graph_module, [passes_of(whole)["drop_layers"]])
    targets = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    path = f"causal_lm.{whole.teacher.captured.layer_path}"
    assert {t.removeprefix(path + ".").split(".")[0] for t in targets if t.startswith(path)} == {"0", "1"}
    held = sum(attribute(graph_module, t).numel() for t in targets if path in t)
    layers = whole.teacher.captured.model.get_submodule(whole.teacher.captured.layer_path)
    assert held == sum(p.numel() for i in (0, 2) for p in layers[i].parameters())


def test_tied_parameters_stay_tied(foundry: Foundry) -> None:
    plan = foundry.plan(foundry.teacher("qwen3"), SMALLER)
    graph_module = run_passes(plan.teacher.captured.graph_module, list(passes_of(plan).values()))
    ends = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr" and "layers" not in str(n.target)}
    assert "causal_lm.model.embed_tokens.weight" in ends and not any("lm_head" in end for end in ends)
