"""A long stream of token ids on disk, in shards: read through memory maps, each block checked when it is first read.

A shard is two or three files: `shard-N.tokens`, where only some tokens are learnt `shard-N.learnt` (a byte each), and
`shard-N.json`, which is written last and holds their lengths and the checksum of every block. `stream.json` says that all
shards are there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minitron.specs.atomic import atomic_path, write_text
from minitron.specs.errors import WorkError

FORMAT_VERSION = 2
INDEX = "stream.json"

BLOCK_TOKENS = 1 << 16
"""Tokens under one checksum: a window reads one or two blocks, whatever the size of the stream."""

Array = np.ndarray[Any, np.dtype[Any]]


class Tokens(Protocol):
    """The token sequence that windows are cut from: an array, or a stream on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


@dataclass(frozen=True)
class Largest:
    """The largest token id of a stream, and the document in which it first occurs."""

    id: int = -1
    where: str = ""


NOTHING = Largest()


@dataclass(frozen=True)
class ShardIndex:
    """The content of `shard-N.json`."""

    tokens: int
    dtype: str
    pieces: int
    """The number of pieces of documents in this shard and all before it: tokenizing resumes there."""

    documents: int
    """Documents that end in this shard or before it."""

    refused: list[str]
    """Documents in this shard that the chat template refused, under `on_error: skip`."""

    checksums: list[int]
    learnt: list[int] | None
    """Checksums of the marks; None where every token is learnt."""

    largest: Largest


def shard_file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"shard-{number:06d}.{kind}"


def write_shard(folder: Path, number: int, tokens: Array, learnt: Array | None, **about: Any) -> ShardIndex:
    """Writes tokens, marks and, last, the index, whose other values are `about`. OSError where a file cannot be
    written; then the shard does not exist.
    """
    for kind, values in (("tokens", tokens), ("learnt", learnt)):
        if values is not None:
            with atomic_path(shard_file(folder, number, kind)) as temporary:
                values.tofile(temporary)
    index = ShardIndex(
        tokens=len(tokens),
        dtype=tokens.dtype.name,
        checksums=_checksums(tokens),
        learnt=None if learnt is None else _checksums(learnt),
        **about,
    )
    write_text(shard_file(folder, number, "json"), json.dumps({"format_version": FORMAT_VERSION} | asdict(index)))
    return index


def _checksums(values: Array) -> list[int]:
    return [zlib.crc32(values[start : start + BLOCK_TOKENS].data) for start in range(0, len(values), BLOCK_TOKENS)]


def read_shard_index(folder: Path, number: int) -> ShardIndex:
    """Reads the index of a shard, but not the shard's contents. ValueError where the files are not those that were
    written, OSError where the shard does not exist.
    """
    try:
        values = json.loads(shard_file(folder, number, "json").read_text(encoding="utf-8"))
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError("it is of another version")
        index = ShardIndex(**values | {"largest": Largest(**values["largest"])})
        width = np.dtype(index.dtype).itemsize
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its index is broken ({error})") from None
    for kind, size in (("tokens", width), ("learnt", 1)):
        file = shard_file(folder, number, kind)
        if (kind == "tokens" or index.learnt is not None) and file.stat().st_size != size * index.tokens:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes and not {size * index.tokens}")
    return index


def is_whole(folder: Path, number: int, index: ShardIndex) -> bool:
    """Checks whether a shard holds what was written. OSError where its files cannot be read."""
    if _checksums(_mapped(shard_file(folder, number, "tokens"), index.dtype, index.tokens)) != index.checksums:
        return False
    return index.learnt is None or index.learnt == _checksums(
        _mapped(shard_file(folder, number, "learnt"), "bool", index.tokens)
    )


class Shards:
    """The shards of one kind as one sequence."""

    def __init__(self, arrays: Iterable[Array], checksums: Iterable[Sequence[int]], folder: Path, kind: str) -> None:
        self.arrays, self.checksums, self.folder, self.kind = list(arrays), list(checksums), folder, kind
        self.ends = np.cumsum([len(array) for array in self.arrays], dtype=np.int64)
        self.checked = [np.zeros(len(sums), bool) for sums in self.checksums]

    def append(self, array: Array, checksums: Sequence[int]) -> None:
        """Adds a shard at the end. Another thread may be reading: the new end is told last."""
        self.checked.append(np.zeros(len(checksums), bool))
        self.checksums.append(checksums)
        self.arrays.append(array)
        self.ends = np.append(self.ends, len(self) + len(array))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, part: slice) -> Array:
        """Returns the values, in memory. WorkError where the file does not hold what was written."""
        start, stop, step = part.indices(len(self))
        assert step == 1
        found = []
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            array = self.arrays[number]
            begin = int(self.ends[number]) - len(array)
            inside = slice(start - begin, min(stop, int(self.ends[number])) - begin)
            self._check(number, inside)
            found.append(np.asarray(array[inside]))
            start, number = begin + inside.stop, number + 1
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def check_all(self) -> None:
        """Checks all blocks. WorkError for the first block that does not hold what was written."""
        for number in range(len(self.arrays)):
            self.check(number)

    def check(self, number: int) -> None:
        """Checks all blocks of one shard. WorkError for the first block that does not hold what was written."""
        self._check(number, slice(0, len(self.arrays[number])))

    def _check(self, number: int, part: slice) -> None:
        if not len(self.checksums[number]):
            return
        for block in range(part.start // BLOCK_TOKENS, -(-part.stop // BLOCK_TOKENS)):
            if self.checked[number][block]:
                continue
            values = np.ascontiguousarray(self.arrays[number][block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS])
            if zlib.crc32(values.data) != self.checksums[number][block]:
                raise self._damaged(number)
            self.checked[number][block] = True

    def _damaged(self, number: int) -> WorkError:
        """Removes the index of a damaged shard, so that the next start makes the shard again, and returns the error."""
        file = shard_file(self.folder, number, self.kind)
        for index in (self.folder / INDEX, shard_file(self.folder, number, "json")):
            index.unlink(missing_ok=True)
        return WorkError(f"{file}: the tokenized data is damaged; run the command again, which makes it again")


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a source. `learnt` marks the tokens whose prediction is trained; None stands for all."""

    tokens: Shards
    learnt: Shards | None
    largest: Largest

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Array:
        return self.tokens[part]

    def tolist(self) -> list[int]:
        """Returns all tokens, in memory."""
        return [int(token) for token in self.tokens[:]]

    @classmethod
    def open(cls, folder: Path, count: int) -> TokenStream:
        """Opens the first `count` shards of a folder. ValueError and OSError as for `read_shard_index`."""
        return cls.of(folder, [read_shard_index(folder, number) for number in range(count)])

    @classmethod
    def of(cls, folder: Path, indices: Sequence[ShardIndex]) -> TokenStream:
        """Opens the shards with these indices."""
        marked = any(index.learnt is not None for index in indices)
        tokens, learnt = Shards([], [], folder, "tokens"), Shards([], [], folder, "learnt")
        for number, index in enumerate(indices):
            append_shard(tokens, learnt, number, index)
        return cls(
            tokens,
            learnt if marked else None,
            max((index.largest for index in indices), key=lambda one: one.id, default=Largest()),
        )


def append_shard(tokens: Shards, learnt: Shards, number: int, index: ShardIndex) -> None:
    """Adds a shard of the folder to its tokens and its marks; those of a shard that is learnt whole take no memory. OSError
    and ValueError, with nothing added, where a file is not what its index says any more.
    """
    folder = tokens.folder
    mapped = _mapped(shard_file(folder, number, "tokens"), index.dtype, index.tokens)
    if index.learnt is None:
        learnt.append(np.broadcast_to(np.True_, index.tokens), [])
    else:
        learnt.append(_mapped(shard_file(folder, number, "learnt"), "bool", index.tokens), index.learnt)
    tokens.append(mapped, index.checksums)


def _mapped(file: Path, dtype: str, count: int) -> Array:
    return np.memmap(file, np.dtype(dtype), "r") if count else np.zeros(0, np.dtype(dtype))
