"""The `weights` check: every element of every tensor in student/ is the one of the teacher that plan.json keeps.

No activation takes part, so that experts to which no token is sent, and rows of tokens that do not occur, are looked at too.
The kept elements of a tensor are those whose flags are set, in their order: nothing of `weights/recipes.py` is used but the
factors that constants were folded into. Tensors are read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import LAYERS
from minitron.compiler.verify.kept import Flags, WrongSelection, flags_over, kept_leaves
from minitron.compiler.weights.recipes import Recipe
from minitron.specs.errors import WorkError

PIECE = 1 << 20
"""Elements that are compared at a time."""

Selection = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Written:
    """Tensors by the student's names; `exact` says that their dtype counts too."""

    names: frozenset[str]
    read: Callable[[str], torch.Tensor]
    exact: bool = True


def files_of(folder: Path) -> Written:
    """The tensors of a folder as its files hold them. WorkError where two files hold one of the same name."""
    from safetensors import SafetensorError, safe_open

    place: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise WorkError(f"{path} cannot be read ({error}); compile again") from None
        for name in names:
            if name in place:
                raise WorkError(f"{place[name].name} and {path.name} both hold {name}; compile again")
            place[name] = path

    def read(name: str) -> torch.Tensor:
        with safe_open(place[name], framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    return Written(frozenset(place), read)


def first_difference(
    teacher: AnalysedTeacher,
    held: Callable[[str], torch.Tensor],
    selection: Selection,
    repairs: Mapping[str, Recipe],
    written: Written,
) -> str | None:
    """The first tensor that is not the teacher's, with the place of the element, in words; None where all are.

    `held` gives the teacher's parameter in the dtype that the spec loads it in; `repairs` are the recipes that scale.
    """
    captured, space = teacher.captured, teacher.table.space
    try:
        kept = kept_leaves(selection, teacher.roles, space.find)
    except WrongSelection as error:
        return f"plan.json: {error}"
    (layers,) = selection[LAYERS]
    numbers = {old: new for new, old in enumerate(layers)}
    names = {
        captured.renumbered(name, numbers): name
        for name in teacher.table.parameters
        if (layer := captured.layer_in_path(name)) is None or layer in numbers
    }
    for name in sorted(names.keys() ^ written.names):
        return f"{name} is {'missing' if name in names else 'there, and the student has no such tensor'}"
    for name, source in names.items():
        flags = flags_over(space, teacher.table.parameters[source], kept)
        found = _compare(name, written.read(name), held(source), flags, repairs.get(name), exact=written.exact)
        if found is not None:
            return found
    return None


def _compare(
    name: str, got: torch.Tensor, teacher: torch.Tensor, flags: Sequence[Flags], repair: Recipe | None, *, exact: bool
) -> str | None:
    if exact and got.dtype != teacher.dtype:
        return f"{name} is {got.dtype}, not {teacher.dtype}"
    flat, place = got.reshape(-1), 0
    for piece in _kept_elements(teacher, flags):
        if repair is not None:
            piece = ((piece.double() + repair.shift) * repair.scale - repair.shift).to(piece.dtype)
        there = flat[place : place + piece.numel()]
        if there.numel() != piece.numel():
            break
        wrong = (there.to(piece.dtype) if exact else there).ne(piece if exact else piece.to(there.dtype)).nonzero()
        if wrong.numel():
            first = int(wrong[0, 0])
            index = [int(i) for i in np.unravel_index(place + first, tuple(got.shape))] if got.dim() else []
            return f"{name} is {float(there[first]):g} at {index}, where the teacher has {float(piece[first]):g}"
        place += piece.numel()
    else:
        if place == flat.numel():
            return None
    return f"{name} has {flat.numel()} elements, and plan.json keeps others of the teacher's {teacher.numel()}"


def _kept_elements(weight: torch.Tensor, flags: Sequence[Flags]) -> Iterator[torch.Tensor]:
    """The elements that all flags keep, in their order, a few rows at a time."""
    if weight.dim() == 0 or not flags:
        yield from torch.split(weight.reshape(-1), PIECE)
        return
    masks = [torch.from_numpy(one) for one in flags]
    step = max(1, PIECE * weight.shape[0] // max(1, weight.numel()))
    for start in range(0, weight.shape[0], step):
        piece = weight[start : start + step]
        keep = torch.ones((), dtype=torch.bool)
        for mask in masks:
            keep = keep & (mask[start : start + step] if mask.shape[0] == weight.shape[0] else mask)
        yield piece[keep.expand(piece.shape)]
