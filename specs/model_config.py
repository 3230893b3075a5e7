"""Reads a model's config.json for compiler and runtime: within bounds, and without keys that only change how the model
is called.

The keys that are left out decide what a call returns, or which kernel computes it, and never which function the model
is: compiler and runtime choose them for themselves. A kernel named `owner/name` would be code from the Hub, which is
never run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.specs.builds import CONFIG
from minitron.specs.errors import UsageError
from minitron.specs.json_files import read_json

CONFIG_LIMIT = 10_000_000  # bytes
MOST_LAYERS = 2_000
"""Layers of a model: ten times the deepest one published. More would take hours to trace, and are a slip of the keyboard."""

CALLING = (
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict", "torchscript",
    "use_cache", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
DTYPE_KEYS = ("dtype", "torch_dtype")
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")

ROPE_SCALING = "rope_scaling"
OLDER_ROTARY_KEYS = (
    "rope_theta", "rotary_emb_base", "rope_base", "global_rope_theta", "local_rope_theta", "rope_local_base_freq",
    "swa_rope_theta", "partial_rotary_factor", "rotary_pct",
)  # fmt: skip
"""Keys of rotary embeddings before transformers 5, beside `rope_scaling`."""


def with_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration that states its dtype under the older key too."""
    return {**config, "torch_dtype": config["dtype"]} if isinstance(config.get("dtype"), str) else dict(config)


def with_older_keys(config: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration that transformers has rewritten, with the older keys of the one it was read from."""
    older = {key: source[key] for key in (*OLDER_ROTARY_KEYS, ROPE_SCALING) if key in source and key not in config}
    return {**with_dtype(config), **older}


def read_model_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration of the model in a folder. UsageError with the reason if it cannot be one."""
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG}; it is not a Hugging Face checkpoint")
    try:
        raw = read_json(path, CONFIG_LIMIT)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}); copy the file again from its source") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UsageError(f"{path} names no model_type; it is not the configuration of a Hugging Face model")
    for at, key, value in _entries(raw):
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"{path}: {at} is not a number (NaN); copy the file again from its source")
        if key in LAYER_KEYS and isinstance(value, int) and value > MOST_LAYERS:
            raise UsageError(
                f"{path} says that the model has {value} layers ({at}); at most {MOST_LAYERS} are possible"
            )
    return _plain(raw)


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration, or a part of it, without `CALLING`, and with dtypes spelled as today."""
    result = {}
    for key, value in part.items():
        if key in CALLING:
            continue
        if isinstance(value, dict):
            value = _plain(value)
        elif key in DTYPE_KEYS and isinstance(value, str):
            value = value.removeprefix("torch.")
        result[key] = value
    return result


def _entries(value: Any, at: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields (path, key, value) of everything in a document; entries of lists have the key of their list."""
    pending = [(at, "", value)]
    while pending:
        at, key, value = pending.pop()
        yield at, key, value
        if isinstance(value, dict):
            pending += [(f"{at}.{name}" if at else str(name), str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{at}[{index}]", key, inner) for index, inner in enumerate(value)]


def positions_of(config: Any) -> int | None:
    """Returns the number of positions that the model of transformers' configuration object reads; None where that does not
    say."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 1 else None


@contextmanager
def alone(config: dict[str, Any]) -> Iterator[Path]:
    """Yields a folder that holds only a configuration, for libraries that read a configuration from a folder only."""
    with tempfile.TemporaryDirectory(prefix="minitron-") as name:
        folder = Path(name)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        yield folder
