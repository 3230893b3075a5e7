"""The teacher's weights with refitted values in the places that the student keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from minitron.compiler.importance.tensor_file import read_tensors, write_tensors
from minitron.compiler.weights.recipes import Recipe
from minitron.compiler.weights.source import WeightSource


class RefittedWeights:
    """Yields a refitted parameter in the teacher's shape: narrowed by its recipe it is what was fitted.

    Values rest in `folder`, a file each, so that one is in memory at a time; those of an earlier process that was at the
    same refit are taken up. `recipes` are by the teacher's names.
    """

    def __init__(self, source: WeightSource, recipes: Mapping[str, Recipe], folder: Path) -> None:
        self.streamed = source.streamed
        self.source, self._recipes, self._folder = source, recipes, folder
        folder.mkdir(exist_ok=True)
        places = {name: self._place(name) for name in recipes}
        self._names = {name: path for name, path in places.items() if read_tensors(path, name) is not None}

    def _place(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def __contains__(self, name: object) -> bool:
        """Tells whether a parameter has its refitted value."""
        return name in self._names

    def store(self, name: str, value: torch.Tensor) -> None:
        """Takes in a parameter of the student under its teacher's name."""
        path = self._place(name)
        write_tensors(path, name, {"value": value})
        self._names[name] = path

    def recipe(self, name: str) -> Recipe:
        """Returns the recipe that cuts the student's parameter from the teacher's."""
        return self._recipes[name]

    def narrowed(self, name: str) -> torch.Tensor:
        """The student's parameter, in float32 where it was refitted."""
        if name in self._names:
            return self._stored(name)
        return self._recipes[name].make(self.source.get(name))

    def get(self, name: str) -> torch.Tensor:
        weight = self.source.get(name)
        if name not in self._names:
            return weight
        positions = self._recipes[name].positions
        kept = [np.arange(size) if one is None else one for one, size in zip(positions, weight.shape, strict=True)]
        whole = weight.float().clone()
        whole[tuple(torch.from_numpy(index) for index in np.ix_(*kept))] = self._stored(name)
        return whole

    def digest(self) -> str:
        """A hash of all that was refitted."""
        digest = hashlib.sha256()
        for name in sorted(self._names):
            digest.update(name.encode() + self._names[name].read_bytes())
        return digest.hexdigest()

    def _stored(self, name: str) -> torch.Tensor:
        from safetensors.torch import load_file

        value: torch.Tensor = load_file(self._names[name])["value"]
        return value
