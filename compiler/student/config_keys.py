"""The keys that configurations know a width by."""

from __future__ import annotations

from typing import Any

from minitron.compiler.roles.names import GROUPS, SCAN_HEAD_DIM, SCAN_HEADS, SHARED

# Keys that a width is known by in the configurations of models that do not use the standard one.
OTHER_KEYS = {
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_intermediate_size"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    GROUPS: ("num_kv_heads", "n_head_kv", "kv_n_heads"),
    SHARED: ("shared_intermediate_size",),
    SCAN_HEADS: ("mamba_n_heads", "n_mamba_heads", "linear_num_value_heads", "num_heads"),
    SCAN_HEAD_DIM: ("mamba_d_head", "mamba_headdim", "linear_value_head_dim", "head_dim"),
}


def config_key(config: Any, name: str, value: int) -> str | None:
    """The configuration's own key for a width, if it has one that says `value`."""
    for key in (name, *OTHER_KEYS.get(name, ())):
        if getattr(config, key, None) == value:
            return key
    return None
