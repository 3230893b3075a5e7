"""The block `teacher`: the model to compress."""

from __future__ import annotations

from typing import Literal

from minitron.specs.blocks.base import Block, Revision, Text


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
