"""The language tower of a multimodal checkpoint as a checkpoint of its own: its configuration and its tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from minitron.compiler.capture.models import build_meta, stored_tensors
from minitron.compiler.teacher.checkpoint import Checkpoint, Tower
from minitron.compiler.teacher.text_config import TIE
from minitron.specs.errors import UsageError


def language_tower(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of the language tower, its tensors by the names of its text-only class; of one tower as it is.

    The tower's tensors are those under the one prefix that holds most of the class's parameters, with the head. Raises
    UsageError where no prefix or several hold them.
    """
    if checkpoint.tower is None or not checkpoint.tensors:
        return checkpoint
    model = build_meta(checkpoint.config, torch.float32, "eager")
    base = _backbone(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    backbone = [name.removeprefix(base) for name in wanted if name.startswith(base)]
    prefix = _prefix(checkpoint, backbone)
    stored = {base + name.removeprefix(prefix): name for name in checkpoint.tensors if name.startswith(prefix)}
    for name in (one for one in wanted if not one.startswith(base)):
        if (found := _only(name, checkpoint.tensors)) is not None:
            stored[name] = found
    config = copy.deepcopy(checkpoint.config)
    tied = getattr(checkpoint.tower.config, TIE, False) and getattr(config, TIE, False)
    setattr(config, TIE, bool(tied) or not all(name in stored for name in _heads(model)))
    tensors = {name: checkpoint.tensors[other] for name, other in stored.items()}
    names = set(stored.values())
    others = {name: info for name, info in checkpoint.tensors.items() if name not in names}
    return replace(checkpoint, config=config, tensors=tensors, tower=Tower(checkpoint.tower.config, stored, others))


def _backbone(model: torch.nn.Module) -> str:
    """The part in front of the names of all parameters but the head's, in the text-only class."""
    counts = {f"{name}.": sum(1 for _ in child.parameters()) for name, child in model.named_children()}
    return max(counts, key=lambda name: counts[name])


def _prefix(checkpoint: Checkpoint, backbone: Collection[str]) -> str:
    """The part in front of the tower's names in the files."""
    names, found = set(backbone), Counter[str]()
    for stored in checkpoint.tensors:
        for place in (0, *(at + 1 for at, character in enumerate(stored) if character == ".")):
            if stored[place:] in names:
                found[stored[:place]] += 1
    ranked = found.most_common(2)
    if not ranked:
        raise UsageError(
            f"{checkpoint.folder}: no tensor has the name of one of its language tower (such as {min(names)}); "
            "save the whole model again with transformers"
        )
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        raise UsageError(
            f"{checkpoint.folder}: {ranked[0][0]}* and {ranked[1][0]}* are both named as its language tower is; "
            "save that tower alone, and name its folder"
        )
    return ranked[0][0]


def _heads(model: torch.nn.Module) -> list[str]:
    """The names of the output head's parameters."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    ours = {id(parameter) for parameter in head.parameters()}
    return [name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in ours][-1:]


def _only(name: str, there: Mapping[str, object]) -> str | None:
    """The one stored name that ends in the name of a parameter outside the backbone, such as the head."""
    found = [stored for stored in there if stored == name or stored.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None
