"""Writes tensors of other checkpoints, under other names, as the weight files of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron.compiler.storage.shards import write_shards
from minitron.compiler.storage.stored import dtype_of, read_stored
from minitron.compiler.storage.tensors import Entry
from minitron.specs.weight_files import TensorInfo


@dataclass(frozen=True)
class Taken:
    """A tensor of another checkpoint: where it lies, its name there, and the indices that are `kept` of a `dimension`, where
    not all are."""

    info: TensorInfo
    stored: str
    dimension: int = 0
    kept: tuple[int, ...] | None = None

    def entry(self, name: str) -> Entry:
        """The tensor as it is written under `name`."""
        shape = list(self.info.shape)
        if self.kept is not None:
            shape[self.dimension] = len(self.kept)
        return Entry(name, dtype_of(self.stored, self.info), tuple(shape))

    def read(self) -> torch.Tensor:
        """Returns the tensor as it is written. WorkError where its file cannot be read."""
        tensor = read_stored(self.stored, self.info)
        return tensor if self.kept is None else tensor.index_select(self.dimension, torch.tensor(self.kept))


def write_taken(folder: Path, taken: Mapping[str, Taken], advance: Callable[[int], None]) -> None:
    """Writes the tensors by name."""
    entries = [one.entry(name) for name, one in taken.items()]
    write_shards(folder, entries, lambda name: taken[name].read(), advance)
