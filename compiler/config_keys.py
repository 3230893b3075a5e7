"""The keys that configurations know a width by."""

from __future__ import annotations

from typing import Any

SHARED = "shared_expert_intermediate_size"

# Keys that a width is known by in the configurations of models that do not use the standard one.
OTHER_KEYS = {
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_intermediate_size"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    SHARED: ("shared_intermediate_size",),
}


def config_key(config: Any, name: str, value: int) -> str | None:
    """The configuration's own key for a width, if it has one that says `value`."""
    for key in (name, *OTHER_KEYS.get(name, ())):
        if getattr(config, key, None) == value:
            return key
    return None
