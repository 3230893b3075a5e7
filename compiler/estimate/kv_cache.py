"""Measures what generation keeps of earlier tokens, from the cache that the model itself fills on the meta device.

The layer's own code decides what is cached: keys and values of every group, the latent vector that both are made of,
keys and values of the last few tokens only, or a state that does not grow at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from minitron.compiler.capture.models import build_meta, quiet, without_grouped_products
from minitron.compiler.estimate.activations import no_packing

REMEMBERED = 256  # models: those of one plan are asked for several times


@dataclass(frozen=True)
class CacheLayer:
    """`elements` that one layer keeps of a token; `window`: of how many tokens at most, None for all of them."""

    elements: int
    window: int | None = None

    def of(self, tokens: int) -> int:
        """Returns the number of elements kept of a sequence of `tokens` tokens."""
        return self.elements * (tokens if self.window is None else min(tokens, self.window))


def cache_layers(config: Any, attention: str) -> Sequence[CacheLayer] | None:
    """Every layer that keeps something of each token. None where the model cannot be run without data."""
    return _cache_layers(_Key(f"{attention} {config.to_json_string(use_diff=False)}", config, attention))


class _Key:
    """A configuration that is equal to another which says the same."""

    def __init__(self, text: str, config: Any, attention: str) -> None:
        self.text, self.config, self.attention = text, config, attention

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=REMEMBERED)
def _cache_layers(key: _Key) -> Sequence[CacheLayer] | None:
    try:
        with quiet(), no_packing(), torch.no_grad():
            # Elements are counted, not bytes: any dtype will do.
            model = without_grouped_products(build_meta(key.config, torch.bfloat16, key.attention))
            filled = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True)
        layers = filled.past_key_values.layers
    except Exception:  # code that wants to see data, or caches of another kind
        return None
    found = []
    for layer in layers:
        held = [value for value in (getattr(layer, name, None) for name in ("keys", "values")) if value is not None]
        if held:
            window = getattr(layer, "sliding_window", None)
            found.append(CacheLayer(sum(value.numel() for value in held), window if isinstance(window, int) else None))
    return tuple(found)
