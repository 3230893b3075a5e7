"""Adds to the student's config.json the keys of older loaders.

transformers 5 holds rotary embeddings in `rope_parameters` and the dtype in `dtype`, and writes nothing else; version 4 and the
servers built on it read `rope_theta`, `rope_scaling`, `torch_dtype` and relatives, and take defaults where these are missing.
So the old keys stand beside the new ones. Which old key is which value is asked of the configuration's own class: it is given a
configuration with that key alone, and the value shows where it is read.

A key is written only where transformers reads the same configuration with it as without it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from minitron.compiler.capture.models import quiet
from minitron.specs.model_config import OLDER_ROTARY_KEYS, ROPE_SCALING, with_dtype

PROBE = 7.25  # a value that no default has
NEW = "rope_parameters"
# What of rope_parameters is said by keys of its own in the older form.
APART = ("rope_theta", "partial_rotary_factor")

Document = dict[str, Any]
Place = tuple[str, ...]


def for_older_loaders(config: Any, document: Document) -> Document:
    """Returns the document of `config`, which transformers has written, with the older keys."""
    plain = with_dtype(document)
    wanted = _read(config, document)
    if wanted is None:
        return plain
    result = plain | _rotary(config, document)
    return result if _read(config, result) == wanted else plain


def _read(config: Any, document: Mapping[str, Any]) -> Any:
    """Reads the configuration of a document as transformers does, without the older keys; None where it cannot."""
    try:
        with quiet():
            read = type(config).from_dict(copy.deepcopy(dict(document))).to_dict()
    except Exception:  # a configuration class raises anything
        return None
    return {key: value for key, value in read.items() if key not in (*OLDER_ROTARY_KEYS, ROPE_SCALING, "torch_dtype")}


def _rotary(config: Any, document: Document) -> Document:
    """Returns the older keys of the rotary embeddings, each with the value of the place that the class reads it
    into."""
    parameters = document.get(NEW)
    if not isinstance(parameters, dict):
        return {}
    bare = {key: value for key, value in document.items() if key != NEW}
    found: Document = {}
    for key in OLDER_ROTARY_KEYS:
        place = _place_of(config, {**bare, key: PROBE})
        value = _at(parameters, place) if place is not None else None
        if value is not None:
            found[key] = value
    scaling = _scaled_part(config, bare, parameters)
    if scaling is not None:
        found[ROPE_SCALING] = scaling
    # All of them, or those that change nothing.
    if _read(config, {**document, **found}) == _read(config, document):
        return found
    return {k: v for k, v in found.items() if _read(config, {**document, k: v}) == _read(config, document)}


def _place_of(config: Any, document: Document) -> Place | None:
    """Finds the probe's place in the rotary parameters that the class reads from a document."""
    read = _read(config, document)
    places = [place for place, value in _leaves((read or {}).get(NEW)) if value == PROBE]
    return places[0] if len(places) == 1 else None


def _scaled_part(config: Any, bare: Document, parameters: Document) -> Document | None:
    """Returns the value of `rope_scaling`: the parameters of a type other than the default one."""
    parts = [one for one in parameters.values() if isinstance(one, dict)]
    if not parts:
        whole = parameters
    else:
        probe = {ROPE_SCALING: {"rope_type": "linear", "factor": PROBE}}
        place = _place_of(config, {**bare, **probe})
        if place is None or len(place) != 2:
            return None
        whole = parameters[place[0]]
    if whole.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in whole.items() if key not in APART}


def _leaves(value: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*at, str(key)))
    else:
        yield at, value


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value
