"""scores.safetensors: the scores of one teacher on one set of samples, and the key that identifies both."""

from __future__ import annotations

from pathlib import Path

from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.tensor_file import read_tensors, write_tensors


def read_scores(path: Path, key: str) -> ScoreTable | None:
    """Reads the scores in `path`; None where there are none, where they are damaged, or where their key is another one."""
    found = read_tensors(path, key)
    return None if found is None else ScoreTable.from_tensors(found[0])


def write_scores(path: Path, key: str, scores: ScoreTable) -> None:
    """Writes the scores whole or not at all."""
    write_tensors(path, key, scores.to_tensors())
