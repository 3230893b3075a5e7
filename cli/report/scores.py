"""The scores of scores.safetensors together with the selection: the score of each part, and whether the part was
kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.cli.sections import Document, part
from minitron.specs.builds import COVARIANCE, EXPERT_OUTPUTS, EXPERT_TOKENS, SCORES
from minitron.specs.errors import WorkError

LAYERS, HEADS, GROUPS = "num_hidden_layers", "num_attention_heads", "num_key_value_heads"

Values = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """The scores of one list of an axis, in the teacher's order."""

    layer: int | None
    """The layer of the list; None where the axis has one list for the whole network."""

    values: Values
    kept: Marks
    dropped_layer: bool = False
    """True where the whole layer was removed for its own score: nothing was chosen in it."""


@dataclass(frozen=True)
class ScoredAxis:
    axis: str
    lists: tuple[Scored, ...]
    chosen: bool
    """True where the student has fewer of them; else everything of a kept layer is marked as kept."""


def read_scores(build: Path, plan: Document) -> list[ScoredAxis]:
    """Reads every axis that was scored, depth first, then as in the file; empty where nothing was. WorkError:
    unreadable.
    """
    path = build / SCORES
    if not path.is_file():
        return []
    found: dict[str, dict[int | None, Values]] = {}
    for key, tensor in _tensors(path):
        name, _, layer = key.partition(".")
        if name in (COVARIANCE, EXPERT_TOKENS, EXPERT_OUTPUTS):
            continue
        number = int(layer) if layer.isdecimal() else None
        found.setdefault(name, {})[number] = tensor.reshape(-1).astype(np.float64)
        if name == HEADS and tensor.ndim == 2:
            # The score of a key-value group is the L2 of its query heads'.
            groups = np.sqrt(np.square(tensor.astype(np.float64)).sum(1))
            found.setdefault(GROUPS, {})[number] = groups
    selection = part(plan, "selection")
    layers = _kept_layers(selection)
    order = sorted(found, key=lambda name: (name != LAYERS, name != "hidden_size"))
    return [_axis(name, found[name], selection.get(name), layers) for name in order]


def _axis(name: str, values: dict[int | None, Values], lists: Any, layers: list[int] | None) -> ScoredAxis:
    """Pairs each list of scores with its list of kept indices: those of a layered axis are given for kept layers only."""
    staying = [key for key in sorted(values, key=lambda key: -1 if key is None else key) if _stays(key, layers)]
    usable = isinstance(lists, list) and len(lists) == len(staying)
    chosen = dict(zip(staying, lists, strict=True)) if usable else {}
    scored = []
    for layer in sorted(values, key=lambda key: -1 if key is None else key):
        gone = not _stays(layer, layers)
        marks = np.full(len(values[layer]), not gone and layer not in chosen)
        if layer in chosen:
            marks[[index for index in chosen[layer] if 0 <= index < len(marks)]] = True
        scored.append(Scored(layer, values[layer], marks, gone))
    return ScoredAxis(name, tuple(scored), bool(chosen))


def _stays(layer: int | None, layers: list[int] | None) -> bool:
    return layer is None or layers is None or layer in layers


def _kept_layers(selection: Document) -> list[int] | None:
    lists = selection.get(LAYERS)
    return lists[0] if isinstance(lists, list) and lists and isinstance(lists[0], list) else None


def _tensors(path: Path) -> list[tuple[str, npt.NDArray[Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return [(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError) as error:
        raise WorkError(f"{path}: cannot be read ({error}); remove it and compile again") from error
