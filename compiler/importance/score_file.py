"""scores.safetensors: the scores of one teacher on one set of samples, and the key that identifies both."""

from __future__ import annotations

from pathlib import Path

from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.tensor_file import read_tensors, write_tensors

_MADE = "made on"


def read_scores(path: Path, key: str, made: str | None = None) -> ScoreTable | None:
    """Reads the scores in `path`; None where there is no such file, it is damaged, its key is another one, or the scores were
    not `made` on this kind of device in this dtype."""
    found = read_tensors(path, key)
    if found is None or (made is not None and found[1].get(_MADE) != made):
        return None
    return ScoreTable.from_tensors(found[0])


def write_scores(path: Path, key: str, scores: ScoreTable, made: str = "") -> None:
    """Writes the scores whole or not at all, with the device and dtype in which they were `made`."""
    write_tensors(path, key, scores.to_tensors(), **{_MADE: made})
