"""The modules of a decoder layer that `gradient_checkpointing: attention` computes again: the plan's estimate and the training
must mean the same ones. Needs no torch."""

from __future__ import annotations

from typing import Any


def attention_of(layer: Any) -> list[Any]:
    """Returns the children of a decoder layer (a torch module) that mix positions: those that know the layer's number, because
    they keep a cache under it."""
    return [child for child in layer.children() if hasattr(child, "layer_idx")]
