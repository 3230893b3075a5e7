"""The keys that configurations know a width by."""

from __future__ import annotations

from typing import Any

from minitron.compiler.roles.names import (
    GROUPS,
    HEAD_DIM,
    INTERMEDIATE,
    MOE_INTERMEDIATE,
    NUM_EXPERTS,
    SCAN_HEAD_DIM,
    SCAN_HEADS,
    SHARED,
)
from minitron.specs.model_config import EXPERT_COUNT_KEYS

# Keys that a width is known by in the configurations of models that do not use the standard one.
OTHER_KEYS = {
    INTERMEDIATE: ("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", MOE_INTERMEDIATE),
    NUM_EXPERTS: EXPERT_COUNT_KEYS[1:],
    GROUPS: ("num_kv_heads", "n_head_kv", "kv_n_heads"),
    SHARED: ("shared_intermediate_size",),
    SCAN_HEADS: ("mamba_n_heads", "n_mamba_heads", "linear_num_value_heads", "num_heads"),
    SCAN_HEAD_DIM: ("mamba_d_head", "mamba_headdim", "linear_value_head_dim", HEAD_DIM),
}


def config_key(config: Any, name: str, value: int) -> str | None:
    """The configuration's own key for a width, if it has one that says `value`."""
    for key in (name, *OTHER_KEYS.get(name, ())):
        if getattr(config, key, None) == value:
            return key
    return None
