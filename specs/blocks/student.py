"""The block `student`: the target widths and depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from minitron.specs.blocks.base import Block, Listed, NonNegativeInt, PositiveInt, Target, Width
from minitron.specs.units import Span

DEPTH = "num_hidden_layers"

LayerNumbers = Annotated[Listed[NonNegativeInt], Field(min_length=1)]


class Layers(Block, json_schema_extra={"oneOf": [{"required": ["drop"]}, {"required": ["keep"]}]}):
    """An explicit list of layers, counted from 0: exactly one of `drop` and `keep`."""

    drop: LayerNumbers | None = None
    """Layers to leave out."""

    keep: LayerNumbers | None = None
    """Layers to keep; all others are left out."""


class Student(Block):
    """Target widths; a key that is left out keeps the teacher's value.

    A value is a number, a share of the teacher's value (`"80%"`), or, under `search`, a list of these or a range
    (`{min: 1024, max: 4096, step: 256}`). `vocab_size` is never changed.
    """

    hidden_size: Width | None = None
    """Width of the residual stream."""

    intermediate_size: Width | None = None
    """Width of the feed-forward layers."""

    num_hidden_layers: Width | None = None
    """Number of layers. Which ones stay is decided by `importance.depth`; `layers` names them outright."""

    num_attention_heads: Width | None = None
    """Number of query heads, over all key-value groups."""

    num_key_value_heads: Width | None = None
    """Number of key-value groups."""

    head_dim: Width | None = None
    """Width of one attention head; refused where rotary position embeddings cannot express it."""

    num_experts: Width | None = None
    """Number of routed experts of a mixture."""

    moe_intermediate_size: Width | None = None
    """Width of one routed expert's feed-forward layer."""

    shared_expert_intermediate_size: Width | None = None
    """Width of the shared expert's feed-forward layer."""

    mamba_num_heads: Width | None = None
    """Number of heads of a mixer that scans (Mamba 2, gated delta net), the same in each of its groups."""

    mamba_head_dim: Width | None = None
    """Width of one of those heads."""

    layers: Layers | None = None
    """Names the layers outright, instead of `num_hidden_layers`: `{drop: [16, 17]}` or `{keep: [...]}`."""

    multiple_of: PositiveInt | None = None
    """The number whose multiples a share of a width is rounded down to. Left out: 64 for widths from 1024 up, else 8."""

    def targets(self) -> Iterator[tuple[str, Target | tuple[Target, ...] | Span[Target]]]:
        """Yields (key, target) for each width that is set, the depth included and `layers` excluded."""
        for key in type(self).model_fields:
            if key not in ("layers", "multiple_of") and (width := getattr(self, key)) is not None:
                yield key, width
