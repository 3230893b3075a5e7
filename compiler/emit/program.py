"""Writes and runs student.pt2: the rewritten graph as a program of torch.export, with the student's buffers and without
its weights."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from minitron.compiler.capture.capture import LONGEST
from minitron.compiler.capture.models import quiet
from minitron.compiler.graph.graph_module import fixed_length, rebuild
from minitron.compiler.graph.names import strip_wrapper
from minitron.specs.atomic import atomic_path
from minitron.specs.errors import WorkError

# What export notes of where a node came from: folders of this machine, addresses of this process. Without them the same
# student is the same file everywhere; the modules that nodes belong to stay.
PRIVATE = ("stack_trace", "from_node")


def build_program(graph_module: GraphModule, buffers: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """Exports the rewritten graph. Parameters are on the meta device, named as in the student's state dict."""
    length = fixed_length(graph_module.graph)
    sample = torch.zeros(2, length or 7, dtype=torch.long)
    with quiet(), torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            plain = _plain(graph_module)
            fake_sample = torch.zeros_like(sample)
        batch = torch.export.Dim("batch", min=1, max=LONGEST)
        sequence = torch.export.Dim("sequence", min=1, max=LONGEST) if length is None else torch.export.Dim.STATIC
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
    for node in program.graph.nodes:
        for key in PRIVATE:
            node.meta.pop(key, None)
    return program


def _plain(graph_module: GraphModule) -> GraphModule:
    """Returns the graph over modules that are named as the model's own, its tensors fake ones of the CPU."""
    return rebuild(graph_module, strip_wrapper, lambda value: torch.empty(tuple(value.shape), dtype=value.dtype))


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes the program, which consists of a graph and a few buffers and fits in memory.

    Torch does not write the file itself: where the disk is full it aborts the process (torch 2.13), and the name of the
    file, here a temporary one, would stand in the archive.
    """
    archive = io.BytesIO()
    with quiet():
        torch.export.save(program, archive)
    with atomic_path(path) as temporary:
        temporary.write_bytes(archive.getbuffer())


# What the README gives to users without this package, with everything passed in. Importing transformers' experts registers
# the operators that their graphs hold.
_RUN = """\
import sys

import torch
from safetensors.torch import load_file, save_file

program, inputs, output, custom, *shards = sys.argv[1:]
if custom == "custom":
    import transformers.integrations.moe
weights = {}
for shard in shards:
    weights |= load_file(shard)
student = torch.export.load(program).module()
student.load_state_dict(weights, strict=False, assign=True)
with torch.no_grad():
    save_file({"logits": student(load_file(inputs)["ids"]).contiguous()}, output)
"""


def holds_custom(graph_module: GraphModule) -> bool:
    """Checks whether the graph holds operators that transformers registers."""
    return any(getattr(node.target, "namespace", None) == "transformers" for node in graph_module.graph.nodes)


def run_program(program: Path, shards: Sequence[Path], ids: torch.Tensor, *, custom: bool = False) -> torch.Tensor:
    """Computes the logits of `student.pt2` on weight files, in a process that knows torch and safetensors only.

    `custom` says that the graph holds operators that transformers registers. WorkError with the process's last line.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file({"ids": ids.contiguous()}, inputs)
        arguments = [program, inputs, output, "custom" if custom else "plain", *shards]
        # -P: a file of the current folder that is called as a module of the library is not that module.
        command = [sys.executable, "-P", "-c", _RUN, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not output.is_file():
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            raise WorkError(f"{program} does not run: {reason}")
        logits: torch.Tensor = load_file(output)["logits"]
        return logits
