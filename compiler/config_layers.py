"""A configuration for some of a model's layers: lists over layers follow those that are kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


def lists_over_layers(config: Any, count: int) -> dict[str, list[Any]]:
    """The configuration's own lists with an entry for each of `count` layers, by key."""
    return {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and not key.startswith("_")
    }


def with_layers(config: Any, count: int, kept: Sequence[int]) -> Any:
    """A copy of the configuration of `count` layers that has only the `kept` ones, in that order."""
    changed = copy.deepcopy(config)
    if len(kept) != count:
        for key, value in lists_over_layers(config, count).items():
            setattr(changed, key, [value[i] for i in kept])
        changed.num_hidden_layers = len(kept)
    return changed
