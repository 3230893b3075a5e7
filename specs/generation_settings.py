"""Reads a model's generation_config.json and removes settings that contradict each other.

Settings that another one disables change nothing, and transformers refuses to save them: a temperature without
sampling, a length penalty without beams, several answers of a greedy search. Such settings are left out, and so is a
file without a JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.specs.json_files import read_json

FILE = "generation_config.json"
_LIMIT = 1_000_000  # bytes

# Settings that are idle while something else is off -> their neutral value, at which they may stand.
_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}  # fmt: skip
_BEAMS = {"early_stopping": False, "length_penalty": 1.0}
_CACHE = {"cache_implementation": None, "cache_config": None}
_OUTPUTS = dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), False)


def read_generation_settings(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the model in a folder; None if there is no file, or no object in the file."""
    path = folder / FILE
    try:
        content = read_json(path, _LIMIT)
    except (OSError, ValueError):
        return None
    return without_contradictions(content) if isinstance(content, dict) else None


def without_contradictions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that have an effect."""
    idle: dict[str, Any] = {}
    beams, answers, padding = (settings.get(key) for key in ("num_beams", "num_return_sequences", "pad_token_id"))
    several = isinstance(beams, int) and not isinstance(beams, bool) and beams > 1
    sampling = settings.get("do_sample") is True
    if not sampling:
        idle |= _SAMPLING
    if not several:
        idle |= _BEAMS
    if settings.get("use_cache") is False:
        idle |= _CACHE
    if settings.get("return_dict_in_generate") is not True:
        idle |= _OUTPUTS
    most = beams if several else (answers if sampling else 1)
    if not isinstance(answers, int) or not isinstance(most, int) or answers > most:
        idle["num_return_sequences"] = None
    if isinstance(padding, int) and padding < 0:
        idle["pad_token_id"] = None
    return {key: value for key, value in settings.items() if key not in idle or value in (None, idle[key])}
