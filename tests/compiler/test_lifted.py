"""Tensors that a model's code makes while it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule

from minitron.compiler.capture.inline_constants import inline
from minitron.specs.errors import UsageError


def exported(run: Callable[[torch.Tensor], torch.Tensor]) -> GraphModule:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(x)

    module = torch.export.export(Model(), (torch.zeros(3, 4),), strict=False).module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


@pytest.mark.parametrize(
    "run",
    [
        lambda x: torch.where(x > 0, x, torch.tensor(-7.5)),
        lambda x: x[:, [2]],
        lambda x: x[:, [-1]] + x[[-2]],
        lambda x: x[[1]] * torch.tensor([3]),
    ],
)
def test_single_values_are_written_into_the_graph(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module, x = exported(run), torch.randn(3, 4)
    inline(module, (), "")
    module.recompile()
    assert not [node for node in module.graph.nodes if node.op == "get_attr"]
    assert torch.equal(module(x), run(x))


def test_several_values_are_refused_with_their_name() -> None:
    module = exported(lambda x: x[:, [2, 0]])
    with pytest.raises(UsageError, match="its code makes a tensor of its own while it runs, lifted_tensor_0"):
        inline(module, (), "")


def test_the_model_s_own_tensors_are_left_alone() -> None:
    module = exported(lambda x: x[:, [2, 0]])
    inline(module, ["lifted_tensor_0"], "")
    assert [node.target for node in module.graph.nodes if node.op == "get_attr"] == ["lifted_tensor_0"]
