"""The rounds of a layer elimination that have ended, and the scores that stood before the first: a compile that is killed
between two rounds, or within one, goes on behind the last that ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.tensor_file import read_tensors, write_tensors

_GONE = "gone"


@dataclass(frozen=True)
class Rounds:
    """The file of one elimination; `key` identifies the teacher, the samples and everything else that decides its rounds."""

    path: Path
    key: str

    def read(self) -> tuple[ScoreTable, tuple[int, ...]] | None:
        """The scores of all other axes, and the layers that are gone, in their order; None where no elimination began, or the
        file is damaged or another's."""
        found = read_tensors(self.path, self.key)
        if found is None:
            return None
        tensors = {
            name: value.clone() for name, value in found[0].items()
        }  # the file is replaced while they are in use
        gone = tuple(int(layer) for layer in tensors.pop(_GONE))
        return ScoreTable.from_tensors(tensors), gone

    def write(self, scores: ScoreTable, gone: Sequence[int]) -> None:
        """Keeps what is known after a round; whole or not at all."""
        write_tensors(self.path, self.key, {**scores.to_tensors(), _GONE: torch.tensor(list(gone), dtype=torch.int64)})

    def remove(self) -> None:
        """Forgets what was kept."""
        self.path.unlink(missing_ok=True)
