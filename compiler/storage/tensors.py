"""Tensors in files, one at a time: reads whole ones or some of their rows, writes safetensors files header first.

Files are read and written with plain system calls and not through a memory map: a tensor takes its own bytes of memory and no
address space for the rest of the file, and a file that is cut short while it is read is an error and not a signal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from minitron.specs.weight_files import TensorInfo

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Below this size of a row, reading the rows between two wanted ones costs less than another system call.
LEAST_ROW_BYTES = 4096
_ALIGNMENT = 8  # of the first tensor in a file, as the format's own library has it


class ShortFile(OSError):
    """A file that ended before the bytes that its header promises."""


def read_tensor(handle: BinaryIO, info: TensorInfo, rows: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
    """Reads a tensor, or of its first dimension the `rows`, ascending. OSError where the bytes cannot be read."""
    dtype = DTYPES[info.dtype]
    if rows is None:
        tensor = torch.empty(info.shape, dtype=dtype)
        if info.nbytes:
            _fill(handle.fileno(), _buffer(tensor), info.start)
        return tensor
    tensor = torch.empty((len(rows), *info.shape[1:]), dtype=dtype)
    row_bytes = info.nbytes // max(info.shape[0], 1)
    if tensor.numel():
        buffer = _buffer(tensor)
        for place, first, count in _runs(rows):
            _fill(
                handle.fileno(), buffer[place * row_bytes : (place + count) * row_bytes], info.start + first * row_bytes
            )
    return tensor


def worth_picking(info: TensorInfo) -> bool:
    """Checks whether rows of a tensor are long enough to be read one by one."""
    return len(info.shape) > 1 and info.shape[0] > 0 and info.nbytes // info.shape[0] >= LEAST_ROW_BYTES


def _runs(rows: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Neighbouring rows together: (place among the wanted, first row in the file, count)."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [len(rows)]])
    return [(int(a), int(rows[a]), int(b - a)) for a, b in zip(starts, ends, strict=True)]


def _buffer(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _fill(file: int, buffer: memoryview, start: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], start + done)
        if count == 0:
            raise ShortFile("the file is cut short")
        done += count


@dataclass(frozen=True)
class Entry:
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wide dtypes first, as the format wants it for the sake of alignment; otherwise as they come."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


class TensorWriter:
    """Writes the entries of a file in their order, each when it is there."""

    def __init__(self, handle: BinaryIO, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for entry in entries:
            begin, end = end, end + entry.nbytes
            header[entry.name] = {
                "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end],
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._handle, self._left = handle, list(entries)
        handle.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        """Writes the next tensor."""
        entry = self._left.pop(0)
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{entry} is not {tensor.shape}"
        if tensor.numel():
            self._handle.write(_buffer(tensor.cpu().contiguous()))

    def end(self) -> None:
        """Asserts that nothing is missing."""
        assert not self._left, f"{self._left[0]} was not written"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file without a second copy of any tensor but the one that is being written."""
    entries = in_file_order(Entry(name, one.dtype, tuple(one.shape)) for name, one in tensors.items())
    with path.open("wb") as handle:
        writer = TensorWriter(handle, entries, metadata)
        for entry in entries:
            writer.write(tensors[entry.name])
        writer.end()


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for `read_tensor`."""
    with path.open("rb", buffering=0) as handle:
        yield handle
