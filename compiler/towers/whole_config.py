"""The other towers of a multimodal model around a narrower language tower: which of their tensors change, and how."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.models import quiet
from minitron.compiler.teacher.checkpoint import Checkpoint, Tower
from minitron.specs.errors import Problem, Refused


@dataclass(frozen=True)
class Projector:
    """The tensors outside the language tower that write its residual stream, as the files name them: name -> the dimension
    of that stream's channels. Empty where hidden_size stays."""

    dimension: Mapping[str, int]


def projector_of(checkpoint: Checkpoint, config: Any) -> Projector:
    """Finds what a student of configuration `config` changes outside the language tower.

    Both models are built on the meta device and the shapes of all other tensors compared. A projector that ends in one
    matrix [.., hidden_size] loses the dropped channels' rows with the stream. Raises Refused where hidden_size stands
    elsewhere: in another tower's configuration, or inside the projector.
    """
    assert checkpoint.tower is not None
    whole, old, new = checkpoint.tower.config, checkpoint.config.hidden_size, config.hidden_size
    before, after = _outside(whole, checkpoint.config), _outside(whole, config)
    changed = {name: shape for name, shape in before.items() if after[name] != shape}
    if old == new:
        assert not changed, "only the residual stream's width is known outside the language tower"
        return Projector({})
    if not changed:
        raise _refusal(
            f"hidden_size cannot change: no tensor between the towers follows it, so another key of the "
            f"{whole.model_type} configuration fixes it"
        )
    owners = {name.rpartition(".")[0] for name in changed}
    matrices = [name for name, shape in changed.items() if len(shape) > 1]
    narrowed = {name: _dimension(before[name], after[name], old, new) for name in changed}
    dimensions = {name: dim for name, dim in narrowed.items() if dim is not None}
    if len(owners) > 1 or len(matrices) != 1 or len(dimensions) < len(narrowed):
        raise _refusal(
            f"hidden_size cannot change: {', '.join(sorted(changed))} have its width, and the projector computes with it "
            "before it writes the residual stream"
        )
    return Projector({_stored_name(name, checkpoint.folder, checkpoint.tower): dim for name, dim in dimensions.items()})


def _refusal(message: str) -> Refused:
    return Refused([Problem("student.hidden_size", message, "leave hidden_size out")])


def _outside(whole: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor outside the language tower, where that has the configuration `config`."""
    from transformers import AutoModel

    changed = copy.deepcopy(whole)
    changed.text_config = copy.deepcopy(config)
    with quiet(), torch.device("meta"):
        model = whole_class(whole)(changed)
        tower = type(AutoModel.from_config(copy.deepcopy(config)))
    ours = {id(one) for module in model.modules() if isinstance(module, tower) for one in module.parameters()}
    head = model.get_output_embeddings()
    ours |= set() if head is None else {id(one) for one in head.parameters()}
    return {name: tuple(one.shape) for name, one in model.named_parameters() if id(one) not in ours}


def whole_class(whole: Any) -> Any:
    """The class of the whole model."""
    import transformers

    named = [getattr(transformers, name, None) for name in whole.architectures or []]
    mapping = transformers.AutoModelForImageTextToText._model_mapping
    found = next((one for one in named if one is not None), mapping.get(type(whole), None))
    if found is None:
        raise Refused(
            [
                Problem(
                    "teacher.tower", f"transformers has no class for the whole {whole.model_type} model", "leave it out"
                )
            ]
        )
    return found


def _dimension(before: tuple[int, ...], after: tuple[int, ...], old: int, new: int) -> int | None:
    """The one dimension that goes from `old` to `new`; None where that is not the only change."""
    places = [at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    return places[0] if len(places) == 1 and (before[places[0]], after[places[0]]) == (old, new) else None


def _stored_name(name: str, folder: Path, tower: Tower) -> str:
    """The name in the files of a parameter of the whole model."""
    parts = name.split(".")
    for start in range(len(parts)):
        ending = ".".join(parts[start:])
        found = [one for one in tower.others if one == ending or one.endswith(f".{ending}")]
        if len(found) == 1:
            return found[0]
    raise Refused([Problem("teacher.tower", f"{folder} has no tensor {name}", "save the whole model again")])
