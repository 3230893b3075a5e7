"""The block `teacher`: the model to compress."""

from __future__ import annotations

from typing import Literal

from minitron.specs.blocks.base import Block, Revision, Text
from minitron.specs.float8 import Compute


class Teacher(Block, json_schema_extra={"oneOf": [{"required": ["model"]}, {"required": ["spec"]}]}):
    """The model to compress: `model`, or `spec` for the result of another spec."""

    model: Text | None = None
    """Hugging Face id, or a folder relative to this file."""

    spec: Text | None = None
    """Instead of `model`: a spec, relative to this file, whose result is the teacher (a chain 15B -> 8B -> 4B)."""

    revision: Revision | None = None
    """Branch, tag or commit of a Hugging Face id; the lock file pins the commit. Left out: the main branch."""

    tower: Literal["language_model"] | None = None
    """The tower of a multimodal model to compress; its other towers and the projector stay. Only with `model`."""

    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """The dtype that the teacher's weights are held in, and the student's are saved in; null: the checkpoint's own."""

    compute: Compute = "bfloat16"
    """The computation of the teacher beside the student and in `minitron capture`. `float8`: the weights of the linear
    layers inside of its decoder layers are held in float8, at half the memory of bfloat16, and their products are
    computed so; it needs what `distill.compute: float8` needs. Scores, selection and evaluation are always those of the
    teacher as it is."""
