"""Finds the lists of a configuration that follow the layers: the model's own code reads entry i for its layer i.

A list with as many entries as there are layers may be anything: token ids, limits, factors. So the model is built and run on
the meta device with lists that write down which of their entries are read by their number, once whole and once with a single
layer. A list over the layers has its later entries read by the whole model, and by the model of one layer none but the first.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch._export.utils import _compiling_state_context

from minitron.compiler.capture.models import build_meta, layer_keys

# One entry a layer, even where there are more entries than layers: modelling code does not read the rest.
ENTRIES = ("layer_types", "no_rope_layers", "layers_block_type")
# Numbers of layers, and not one entry a layer, even where there happen to be as many.
NUMBERS = ("mlp_only_layers", "moe_layers")
# Ids of tokens, however many there are.
TOKENS = ("token_id", "token_ids", "tokens")


def lists_over_layers(config: Any, count: int) -> dict[str, list[Any]]:
    """The configuration's own lists with an entry for each of `count` layers, by key; entries of no layer are left out."""
    known = [key for key in ENTRIES if isinstance(vars(config).get(key), list) and len(vars(config)[key]) >= count]
    others = [
        key
        for key, value in vars(config).items()
        if isinstance(value, list)
        and len(value) == count
        and not key.startswith("_")
        and not key.endswith(TOKENS)
        and key not in NUMBERS + ENTRIES
    ]
    found = {*known, *(read_by_layer(config, count, others) if others and count > 1 else ())}
    return {key: value[:count] for key, value in vars(config).items() if key in found}


def kinds_by_lists(config: Any, count: int) -> list[str]:
    """Returns the kind of each of `count` layers, as the configuration's lists over layers tell it."""
    lists = list(lists_over_layers(config, count).values())
    return [repr([one[layer] for one in lists]) for layer in range(count)]


def some_of_each_kind(kinds: Sequence[str], layers: Iterable[int], count: int) -> list[int]:
    """Returns the first `count` of `layers` of each kind, in their order."""
    seen: dict[str, int] = {}
    few = []
    for layer in layers:
        seen[kinds[layer]] = seen.get(kinds[layer], 0) + 1
        if seen[kinds[layer]] <= count:
            few.append(layer)
    return few


def read_by_layer(config: Any, count: int, keys: Collection[str]) -> set[str]:
    """The lists among `keys` that the model reads layer by layer."""
    whole, alone = _entries_read(config, count, keys), _entries_read(config, 1, keys)
    return {key for key in keys if whole[key] - {0} and alone[key] <= {0}}


def _entries_read(config: Any, count: int, keys: Collection[str]) -> dict[str, set[int]]:
    """The entries of each list that a model with `count` layers reads while it is built and run, as far as it runs."""
    read: dict[str, set[int]] = {key: set() for key in keys}
    watched = copy.deepcopy(config)
    for key in layer_keys(config):
        setattr(watched, key, count)
    for key in keys:
        setattr(watched, key, _watching(read[key])(vars(config)[key]))
    try:
        model = build_meta(watched, torch.float32, "eager")
        with torch.no_grad(), _compiling_state_context():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:  # what was read until then is known; a model that cannot be built is refused elsewhere
        pass
    return read


def _watching(read: set[int]) -> type[list[Any]]:
    """A list that writes into `read` which of its entries are read one by one."""

    class Watched(list[Any]):
        def __getitem__(self, place: Any) -> Any:
            if isinstance(place, int):
                read.add(place % len(self))
            elif isinstance(place, slice):
                read.update(range(*place.indices(len(self))))
            return super().__getitem__(place)

        def __deepcopy__(self, memo: Any) -> Any:
            return Watched(self)

    return Watched
