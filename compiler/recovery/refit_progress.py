"""The progress of a refit, saved from time to time, so that one that was killed goes on where it was.

The values that were fitted are in files of their own (`refitted_weights.py`); here is what was known of each batch behind the
last layer, of teacher and student, so that no layer is run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minitron.compiler.graph.streams import Values
from minitron.compiler.importance.progress_file import SaveTimer
from minitron.compiler.importance.tensor_file import read_tensors, write_tensors

_KEY = "refit"  # the folder says of which teacher, data and student


@dataclass(frozen=True)
class Reached:
    """The progress of a refit: the segments of `teacher` and `student` that all batches are through, and the values of each
    batch behind them."""

    teacher: int
    student: int
    theirs: Sequence[Values]
    own: Sequence[Values]


@dataclass(frozen=True)
class RefitProgress:
    """The file that keeps it."""

    path: Path
    timer: SaveTimer = field(default_factory=SaveTimer)

    def save(self, now: Reached) -> None:
        """Saves, where it is time to; nothing where a graph hands on a value that is not a tensor."""
        if not self.timer.due():
            return
        tensors: dict[str, torch.Tensor] = {}
        for side, batches in (("theirs", now.theirs), ("own", now.own)):
            for number, values in enumerate(batches):
                for name, value in values.items():
                    if not isinstance(value, torch.Tensor):
                        return
                    tensors[f"{side}/{number}/{name}"] = value
        with self.timer.saving():
            write_tensors(self.path, _KEY, tensors, teacher=str(now.teacher), student=str(now.student))

    def read(self) -> Reached | None:
        """Reads what an earlier process saved; None where there is nothing, or it is damaged."""
        found = read_tensors(self.path, _KEY)
        if found is None:
            return None
        sides: Mapping[str, dict[int, Values]] = {"theirs": {}, "own": {}}
        for key, value in found[0].items():
            side, number, name = key.split("/", 2)
            # Copied: the file is replaced while its tensors are in use.
            sides[side].setdefault(int(number), {})[name] = value.clone()
        theirs, own = ([values for _, values in sorted(sides[side].items())] for side in ("theirs", "own"))
        return Reached(int(found[1]["teacher"]), int(found[1]["student"]), theirs, own)
