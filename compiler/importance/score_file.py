"""scores.safetensors: the scores of one teacher on one set of samples, and the key that identifies both."""

from __future__ import annotations

from pathlib import Path

from minitron.compiler.importance.scores import ScoreTable
from minitron.specs.atomic import atomic_path


def read_scores(path: Path, key: str) -> ScoreTable | None:
    """The scores in `path`; None where there are none, where they are damaged, or where their key is another one."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            if (handle.metadata() or {}).get("key") != key:
                return None
            return ScoreTable.from_tensors({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except SafetensorError:
        return None


def write_scores(path: Path, key: str, scores: ScoreTable) -> None:
    """Writes the scores whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(scores.to_tensors(), temporary, metadata={"key": key})
