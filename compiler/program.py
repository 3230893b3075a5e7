"""student.pt2: the rewritten graph as a program of torch.export, with the student's tables and without its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from minitron.compiler.capture import LONGEST, attribute, quiet, strip_wrapper
from minitron.specs.atomic import atomic_path


def build_program(graph_module: GraphModule, buffers: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """Exports the rewritten graph anew. Parameters are on the meta device, named as in the student's state dict."""
    sample = torch.zeros(2, 7, dtype=torch.long)
    with quiet(), torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            plain = _plain(graph_module)
            fake_sample = torch.zeros(2, 7, dtype=torch.long)
        batch = torch.export.Dim("batch", min=1, max=LONGEST)
        sequence = torch.export.Dim("sequence", min=1, max=LONGEST)
        program = torch.export.export(plain, (fake_sample,), dynamic_shapes=({0: batch, 1: sequence},), strict=False)
    for name, value in list(program.state_dict.items()):
        if name in buffers:
            program.state_dict[name] = buffers[name]
        else:
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            program.state_dict[name] = torch.nn.Parameter(empty, requires_grad=False)
    for name in list(program.constants):
        program.constants[name] = buffers[name]
    program.example_inputs = ((sample,), {})
    return program


def _plain(graph_module: GraphModule) -> GraphModule:
    """The graph over modules that are named as the model's own, without the wrapper's prefix."""
    graph = copy.deepcopy(graph_module.graph)
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        old = attribute(graph_module, str(node.target))
        node.target = strip_wrapper(str(node.target))
        holder, _, name = str(node.target).rpartition(".")
        module = root
        for step in filter(None, holder.split(".")):
            if step not in module._modules:
                module.add_module(step, torch.nn.Module())
            module = module.get_submodule(step)
        empty = torch.empty(old.shape, dtype=old.dtype)
        if isinstance(old, torch.nn.Parameter):
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
        else:
            module.register_buffer(name, empty)
    return GraphModule(root, graph)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes the program; torch wants the name to end in .pt2, so the temporary one does too."""
    with atomic_path(path) as temporary:
        ending = temporary.with_suffix(".pt2")
        try:
            with quiet():
                torch.export.save(program, ending)
            ending.replace(temporary)
        finally:
            ending.unlink(missing_ok=True)


def run_program(path: Path, weights: Mapping[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """What a user without this package does: loads the program, gives it the weights, calls it."""
    with quiet():
        module: Any = torch.export.load(path).module()
    module.load_state_dict(dict(weights), strict=False, assign=True)
    with torch.no_grad():
        return module(input_ids)  # type: ignore[no-any-return]
