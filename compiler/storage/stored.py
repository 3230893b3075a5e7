"""Reads one tensor of a weight file, or says what is wrong with the file."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import torch

from minitron.compiler.storage.tensors import DTYPES, ShortFile, read_tensor, reading
from minitron.specs.errors import WorkError
from minitron.specs.weight_files import TensorInfo, file_mark


def dtype_of(name: str, info: TensorInfo) -> torch.dtype:
    """The dtype of the tensor that is stored under `name`. WorkError for one that torch does not have."""
    if info.dtype not in DTYPES:
        raise WorkError(
            f"{info.file}: {name} is in {info.dtype}, a dtype that torch does not have; convert the weights to bfloat16"
        )
    return DTYPES[info.dtype]


def read_stored(name: str, info: TensorInfo, rows: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
    """Reads the tensor that is stored under `name`, or its `rows`, ascending.

    Raises WorkError where the bytes cannot be read, and where the file is not the one whose header was read.
    """
    dtype_of(name, info)
    try:
        with reading(info.file) as handle:
            tensor = read_tensor(handle, info, rows)
            now = file_mark(os.fstat(handle.fileno()))  # after: the file may change while it is read
    except ShortFile:
        raise WorkError(f"{info.file} ends before the last byte of {name}; copy the file again") from None
    except OSError as error:
        raise WorkError(
            f"{info.file}: {name} cannot be read ({error.strerror or error}); check the disk, or copy the file again"
        ) from None
    if info.mark is not None and info.mark != now:
        raise WorkError(f"{info.file} changed while it was in use; let it rest and run the command again")
    return tensor
