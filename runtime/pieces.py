"""The state of a training as this rank holds it: whole tensors, or rows of tensors that are sharded over the ranks.

A checkpoint is written and read in these pieces, each with its place in the whole tensor. So every rank writes only the
pieces it holds and reads only the pieces it needs, and a training can resume with any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from minitron.runtime.sharding import local, rows_of_rank

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
"""The dtypes that states are written in, by safetensors' names."""

ROWS = "rows"
"""The key in the header of a file: JSON, name -> [first row, shape of the whole tensor], for tensors that are not
whole.
"""


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor: those of `tensor` begin at row `start` of a whole tensor of `shape`."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return tuple(self.tensor.shape) == self.shape


def piece_of(tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), 0, shape)
    rows, mesh = local(tensor.detach()), tensor.device_mesh
    return Piece(rows, rows_of_rank(shape[0], mesh.get_local_rank(), mesh.size()).start, shape)


def model_pieces(model: torch.nn.Module) -> dict[str, Piece]:
    """Returns parameters and persistent buffers by name; tied weights stand under their first name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {name: piece_of(tensor) for name, tensor in (tensors | buffers).items()}


def optimizer_pieces(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
    """Returns the optimizer's state of each parameter, as `exp_avg/NAME`."""
    return {
        f"{key}/{name}": piece_of(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


class PieceFiles:
    """The safetensors files that hold the pieces of tensors, read as if the tensors were whole."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads the headers. OSError and SafetensorError for files that are not safetensors."""
        self._stack = ExitStack()
        self._found: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            placed = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                found = file.get_slice(name)
                shape = tuple(found.get_shape())
                self.dtypes[name] = _DTYPES.get(found.get_dtype(), torch.float32)
                start, whole = placed.get(name, (0, shape))
                self.shapes[name] = tuple(whole)
                self._found.setdefault(name, []).append((start, start + (shape[0] if shape else 1), file))

    def __enter__(self) -> PieceFiles:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def whole(self, name: str) -> Tensor:
        """Reads one whole tensor to the CPU."""
        shape = self.shapes[name]
        (_, _, file), *others = self._found[name]
        if not shape:
            return file.get_tensor(name)  # type: ignore[no-any-return]
        rows = [file.get_slice(name)[:] for _, _, file in sorted(self._found[name], key=lambda found: found[0])]
        return torch.cat(rows) if others else rows[0]

    @torch.no_grad()
    def fill(self, name: str, piece: Piece) -> bool:
        """Fills `piece` with its rows of the whole tensor. False where the files lack any of the rows."""
        if self.shapes.get(name) != piece.shape:
            return False
        if not piece.shape:
            piece.tensor.copy_(self.whole(name))
            return True
        stop, filled = piece.start + piece.tensor.shape[0], 0
        for first, last, file in self._found[name]:
            begin, end = max(first, piece.start), min(last, stop)
            if begin < end:
                rows = file.get_slice(name)[begin - first : end - first]
                piece.tensor[begin - piece.start : end - piece.start].copy_(rows)
                filled += end - begin
        return filled == piece.tensor.shape[0]


def header(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Returns the file metadata that records the place of each piece in its tensor."""
    return {ROWS: json.dumps({name: [one.start, one.shape] for name, one in pieces.items() if not one.whole})}


def worth_writing(pieces: Mapping[str, Piece], first: bool) -> Iterator[tuple[str, Piece]]:
    """Yields the pieces that this rank has to write: its rows, and whole tensors on the `first` rank alone."""
    for name, piece in pieces.items():
        if first if piece.whole else piece.tensor.numel():
            yield name, piece
