"""A configuration for some of a model's layers: what it says layer by layer follows those that are kept.

Lists with an entry for each layer lose those of dropped layers. Which layers have experts is said by numbers of layers or by a
rule too; these are rewritten as far as they can say it of what is left. Whether they do is for the student's shapes to prove.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from minitron.compiler.capture.layer_lists import NUMBERS, lists_over_layers
from minitron.compiler.capture.models import LAYER_COUNTS, layer_keys

# Keys that say by a rule which layers are which. Those over lists say what a list over the layers says.
OVER_LISTS = (
    "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval", "global_attn_every_n_layers",
    "max_window_layers", "no_rope_layer_interval",
)  # fmt: skip
RULES = (
    *NUMBERS, *LAYER_COUNTS, *OVER_LISTS, "decoder_sparse_step", "first_k_dense_replace", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval",
)  # fmt: skip


def with_layers(config: Any, count: int, kept: Sequence[int]) -> Any:
    """A copy of the configuration of `count` layers that has only the `kept` ones, in that order."""
    changed = copy.deepcopy(config)
    if len(kept) != count:
        for key, value in lists_over_layers(config, count).items():
            setattr(changed, key, [value[i] for i in kept])
        _follow_experts(changed, count, kept)
        _follow_lists(changed)
        for key in layer_keys(config):
            setattr(changed, key, len(kept))
    return changed


def _follow_experts(config: Any, count: int, kept: Sequence[int]) -> None:
    """Rewrites in place the keys that say which layers have experts."""
    new = {old: number for number, old in enumerate(kept)}

    def number(key: str) -> int | None:
        value = getattr(config, key, None)
        return value if isinstance(value, int) else None

    step, named = number("decoder_sparse_step"), getattr(config, "mlp_only_layers", None)
    if step is not None and hasattr(config, "mlp_only_layers"):
        # Every n-th layer: now every layer, except those that are named.
        dense = {layer for layer in range(count) if layer in (named or []) or (layer + 1) % step}
        config.decoder_sparse_step = 1
        config.mlp_only_layers = sorted(dense)
    for key in NUMBERS:
        value = getattr(config, key, None)
        if isinstance(value, list):
            setattr(config, key, [new[layer] for layer in value if layer in new])
    first = number("first_k_dense_replace")
    if first is not None:
        config.first_k_dense_replace = sum(layer < first for layer in kept)
    start, end, interval = (number(f"moe_layer_{key}") for key in ("start_index", "end_index", "interval"))
    if start is not None and end is not None and interval is not None:
        last = end if end >= 0 else count + end
        sparse = [new[layer] for layer in kept if start <= layer <= last and (layer + 1) % interval == 0]
        if sparse and len(sparse) == sparse[-1] - sparse[0] + 1:
            config.moe_layer_start_index, config.moe_layer_end_index = sparse[0], sparse[-1]
            config.moe_layer_interval = 1


def _follow_lists(config: Any) -> None:
    """Makes keys that say by a rule what a list over the layers says agree with the list, or removes them.

    transformers 5 reads the lists alone; other loaders, and those of older versions, read the rules.
    """
    kinds, rotary = getattr(config, "layer_types", None), getattr(config, "no_rope_layers", None)
    said: dict[str, int | None] = {}
    if isinstance(kinds, list):
        full = [kind == "full_attention" for kind in kinds]
        first = next((i for i, one in enumerate(full) if not one), len(full))
        every = _every(full)
        said |= dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"), every)
        said["global_attn_every_n_layers"] = every
        said["max_window_layers"] = None if any(full[first:]) else first
    if isinstance(rotary, list):
        said["no_rope_layer_interval"] = _every([not one for one in rotary])
    for key, value in said.items():
        if not isinstance(vars(config).get(key), int):
            continue
        if value is not None:
            setattr(config, key, value)
        elif not hasattr(type(config), key):  # one that the class declares has to stay
            delattr(config, key)


def _every(entries: list[bool]) -> int | None:
    """Returns n where exactly every n-th entry is set, counted from 1; None where no n fits."""
    for n in range(1, len(entries) + 2):
        if entries == [(i + 1) % n == 0 for i in range(len(entries))]:
            return n
    return None
