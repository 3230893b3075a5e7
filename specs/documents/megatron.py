"""Reads the token files of Megatron-LM: `.bin` holds the tokens, `.idx` their type and the sequences' lengths.

Layout of an `.idx` file, little endian: the magic `MMIDIDX\\0\\0`, version (uint64, 1), type code (uint8), number of
sequences n (uint64), number of document marks m (uint64), n lengths (int32), n byte offsets into the `.bin` (int64), m marks
(int64): document i is the sequences from mark i to mark i + 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.specs.data_files import unreadable
from minitron.specs.documents.kinds import Piece, TokenIds
from minitron.specs.errors import WorkError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class MegatronTokens:
    """The tokens of one `.bin` file, memory-mapped, and the start of each document; the last start is the number of
    tokens."""

    tokens: Any
    bounds: Any


def open_megatron(file: Path) -> MegatronTokens:
    """Opens a `.bin` file and its `.idx`. WorkError if one is missing, broken, or does not belong to the other."""
    import numpy as np

    index = file.with_suffix(".idx")
    try:
        content, size = index.read_bytes(), file.stat().st_size
    except OSError as error:
        raise unreadable(Path(error.filename or index), error) from None
    head = len(_MAGIC) + _HEADER.size
    if not content.startswith(_MAGIC) or len(content) < head:
        raise WorkError(f"{index}: is not an index of Megatron-LM; name the .bin file whose .idx lies beside it")
    version, code, sequences, marks = _HEADER.unpack_from(content, len(_MAGIC))
    if version != 1 or code not in _DTYPES:
        raise WorkError(f"{index}: version {version} with type {code} is not read; integer tokens of version 1 are")
    if len(content) < head + 12 * sequences + 8 * marks:
        raise _broken(index, "it is cut short")
    lengths = np.frombuffer(content, "<i4", sequences, head).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", sequences, head + 4 * sequences)
    documents = np.frombuffer(content, "<i8", marks, head + 12 * sequences)
    dtype = np.dtype(_DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or not np.array_equal(offsets, ends[:-1] * dtype.itemsize):
        raise _broken(index, "its sequences do not follow one another")
    if size != ends[-1] * dtype.itemsize:
        raise _broken(index, f"{file.name} has {size} bytes and not {ends[-1] * dtype.itemsize}")
    if marks and ((np.diff(documents) < 0).any() or documents[0] != 0 or documents[-1] != sequences):
        raise _broken(index, "its documents do not follow one another")
    bounds = ends[documents] if marks else ends
    tokens = np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
    return MegatronTokens(tokens, bounds)


def read_megatron(file: Path) -> Iterator[Piece]:
    opened = open_megatron(file)
    for number, (start, end) in enumerate(zip(opened.bounds[:-1], opened.bounds[1:], strict=True), 1):
        if end > start:
            yield Piece(TokenIds(opened.tokens[start:end]), f"{file} document {number}")


def _broken(index: Path, why: str) -> WorkError:
    return WorkError(f"{index}: does not fit its .bin ({why}); write both files again")
