"""coordinates.safetensors: what the student keeps of the teacher's hidden states."""

from __future__ import annotations

from pathlib import Path

import torch

from minitron.specs.atomic import atomic_path


def write_coordinates(path: Path, kept: torch.Tensor | None) -> None:
    """Writes `index`, the kept channels [width], or `matrix`, the kept components [teacher's width, width]; removes the file
    where the training needs none."""
    from safetensors.torch import save_file

    if kept is None:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        save_file({"matrix" if kept.dim() == 2 else "index": kept.contiguous()}, temporary)


def same_coordinates(path: Path, kept: torch.Tensor) -> bool:
    """Checks whether the file holds these coordinates and nothing else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError:
        return False
    found = tensors.get("matrix" if kept.dim() == 2 else "index")
    return len(tensors) == 1 and found is not None and torch.equal(found, kept)
