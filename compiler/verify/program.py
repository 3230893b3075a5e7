"""The `program` check: student.pt2, run by plain torch on student/'s weights, equals the Hugging Face model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.emit.program import holds_custom, run_program
from minitron.compiler.verify.checks import Check, broken
from minitron.compiler.verify.comparison import MARGIN, Floor, compare, distance
from minitron.compiler.verify.hugging_face import logits_of
from minitron.compiler.verify.routes import Routes
from minitron.specs.builds import PROGRAM, STUDENT
from minitron.specs.errors import WorkError

# Both sides round at the same places. A share of what rounding does to the model's logits is allowed for kernels that
# split their sums in another way.
SHARE = 0.1


def program(routes: Routes) -> Check:
    """Runs the program in its own dtype, in a process of its own."""
    unrounded, dtype = routes.loaded, routes.subject.teacher.captured.dtype
    try:
        got = _run(routes)
    except WorkError as error:
        return broken("program", error)
    detail = "student.pt2 on student/'s weights against the Hugging Face model"
    if dtype == torch.float32:
        return compare("program", got, unrounded, detail, routes.floor)
    # Activations are rounded at every operator, and routers may decide by a rounding: on both sides in the same way.
    rounded = logits_of(routes.model, routes.ids).float()
    floor = Floor(distance(rounded, unrounded) * SHARE / MARGIN)
    return compare("program", got.float(), rounded, f"{detail}, both in {str(dtype).removeprefix('torch.')}", floor)


def _run(routes: Routes) -> torch.Tensor:
    """The program's logits on the files of student/.

    Where transformers converts a checkpoint while loading it, the files have other names than the model's parameters:
    then the loaded model's own are written out for the comparison.
    """
    subject = routes.subject
    build, custom = subject.build, holds_custom(subject.student.graph_module)
    if subject.source.streamed:
        return run_program(build / PROGRAM, sorted((build / STUDENT).glob("*.safetensors")), routes.ids, custom=custom)
    dtype = subject.teacher.captured.dtype
    with tempfile.TemporaryDirectory(dir=build, prefix=".minitron-weights.", suffix=".tmp") as folder:
        path = Path(folder) / "weights.safetensors"
        weights = {name: value.detach().to(dtype).contiguous() for name, value in stored_tensors(routes.model).items()}
        save_file(weights, path)
        return run_program(build / PROGRAM, [path], routes.ids, custom=custom)
