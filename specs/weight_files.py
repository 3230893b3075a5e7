"""Finds the weight files that make up the model in a checkpoint folder, and reads their headers.

Compiler and runtime both find files here, in the order in which transformers looks for them: the file that config.json
names as `transformers_weights`, model.safetensors, then the shards of the index. A remark names the files beside them
that are ignored. A folder in which two of these places hold different weights is refused, because nobody can tell which
of them was meant.

Headers are read here and not with `safetensors.safe_open`: its slices tell dtype and shape, but not where in the file a
tensor lies, which comparing two files needs; it loads numpy, which `minitron validate` does without; and its errors do
not say how many bytes are missing. Whoever reads weights uses it.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from minitron.specs.errors import UsageError, WorkError
from minitron.specs.json_files import parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

HEADER_LIMIT = 25_000_000
"""Bytes of a header: 200,000 tensors in one file, ten times what the largest models have in one."""
INDEX_LIMIT = 100_000_000
_PIECE = 1 << 22  # bytes of two files that are compared at a time
_SHOWN = 3  # files that a remark names one by one
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FileMark = tuple[int, int, int]


def file_mark(stat: os.stat_result) -> FileMark:
    """Returns figures that change with the content of a file: size, time and inode."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weight file, from its header: `dtype` as safetensors spells it (BF16, F32, ...), `start` the
    offset of its first byte in the file, `mark` what the file was when its header was read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0
    mark: FileMark | None = None


@dataclass(frozen=True)
class WeightFiles:
    """The files that make up a model, sorted; none if the folder has no weights. `remarks` name the ignored files."""

    paths: tuple[Path, ...]
    remarks: tuple[str, ...] = ()


def find_weight_files(folder: Path) -> WeightFiles:
    """Returns the weight files of a checkpoint folder.

    UsageError if an adapter lies there, WorkError if files are missing, broken, or contradict one another.
    """
    check_no_adapter(folder)
    named = _named_in_config(folder)
    index = folder / (named if named is not None and named.endswith(".index.json") else INDEX)
    if named is not None and not (folder / named).is_file():
        raise WorkError(
            f"{folder}: config.json names {named} as its weights (transformers_weights), and it is not there; copy it "
            "there, or remove the key"
        )
    single = folder / (SINGLE if named is None or named.endswith(".index.json") else named)
    if single.is_file() and index.name != named:
        paths = [single]
        ignored = _beside_single(folder, single, index)
    elif index.is_file():
        names = indexed_files(index)
        paths = [folder / name for name in names if (folder / name).is_file()]
        if paths and len(paths) < len(names):
            missing = next(name for name in names if not (folder / name).is_file())
            raise WorkError(f"{folder}: {missing} is named in {index.name} and is not there; copy the checkpoint again")
        ignored = []
    else:
        return WeightFiles(())
    others = sorted(path.name for path in folder.glob("*.safetensors") if path not in paths)
    if paths and others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        ignored.append(f"{', '.join(others[:_SHOWN])}{more}")
    remarks = [f"the weights are those of {_names(paths)}; ignored: {'; '.join(ignored)}"] if ignored else []
    return WeightFiles(tuple(paths), tuple(remarks))


def check_no_adapter(folder: Path) -> None:
    """Raises UsageError if a folder holds an adapter, alone or beside the weights of its base model."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    base = ""
    try:
        document = read_json(folder / ADAPTER_CONFIG, INDEX_LIMIT)
        name = document.get("base_model_name_or_path") if isinstance(document, dict) else None
        base = f" of {name}" if isinstance(name, str) and name else ""
    except (OSError, ValueError):
        pass
    merge = "merge it into its base model (peft: merge_and_unload, then save_pretrained) and name the merged folder"
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        raise UsageError(
            f"{folder} holds an adapter{base} beside its weights ({ADAPTER_CONFIG}), which transformers would load with "
            f"them; {merge}, or remove the adapter_* files"
        )
    raise UsageError(f"{folder} is an adapter{base} ({ADAPTER_CONFIG}) and not a whole model; {merge}")


def indexed_files(index: Path) -> list[str]:
    """Returns the file names in an index, sorted. WorkError if the index is broken, or lacks keys that transformers
    reads."""
    try:
        document = read_json(index, INDEX_LIMIT)
        names = sorted(set(document["weight_map"].values()))
        if strange := next((name for name in names if not isinstance(name, str) or Path(name).name != name), None):
            raise ValueError(f"{strange!r} is not the name of a file beside it")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WorkError(f"{index} is broken ({_words(error)}); copy the checkpoint again") from None
    if not isinstance(document.get("metadata"), dict):
        raise WorkError(
            f'{index} has no "metadata", without which transformers does not load the model; write "metadata": {{}} into '
            "it, or copy the checkpoint again"
        )
    return names


def read_headers(files: WeightFiles | Sequence[Path]) -> dict[str, TensorInfo]:
    """Returns all tensors of the files, by name. WorkError if a file is broken, or two files hold different tensors of
    one name."""
    paths = files.paths if isinstance(files, WeightFiles) else files
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in read_header(path).items():
            other = tensors.get(name)
            if other is not None and not _same(other, info):
                raise WorkError(
                    f"{path.parent}: {name} is in {other.file.name} and, with other values, in {path.name}; one of the "
                    "files belongs to another save: copy the checkpoint again"
                )
            tensors[name] = info  # the last one counts, as in transformers
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one safetensors file. WorkError if the file is broken or cut short."""
    try:
        with path.open("rb") as handle:
            stat = os.fstat(handle.fileno())
            size = stat.st_size
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            if length > HEADER_LIMIT:
                raise ValueError(f"its header has {length} bytes, and none of a model has more than {HEADER_LIMIT}")
            header = parse_json(handle.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, entry, 8 + length, file_mark(stat)) for name, entry in header.items()}
    except OSError as error:
        raise WorkError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise WorkError(f"{path} is not a whole safetensors file ({_words(error)}); copy it again") from None
    expected = 8 + length + sum(info.nbytes for info in tensors.values())
    if size != expected:
        raise WorkError(f"{path} is not a whole safetensors file ({size} of {expected} bytes); copy it again")
    return tensors


def _tensor(path: Path, entry: Mapping[str, Any], data: int, mark: FileMark) -> TensorInfo:
    begin, end = (int(place) for place in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    bits = _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"a tensor of {list(shape)} in {dtype} does not have {end - begin} bytes")
    return TensorInfo(path, dtype, shape, end - begin, data + begin, mark)


def _named_in_config(folder: Path) -> str | None:
    """Returns the weight file that config.json names, which transformers prefers to all others. WorkError if it cannot
    be one."""
    try:
        document = read_json(folder / "config.json", INDEX_LIMIT)
    except (OSError, ValueError):
        return None  # whoever reads the configuration says what is wrong with it
    name = document.get("transformers_weights") if isinstance(document, dict) else None
    if name is None:
        return None
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise WorkError(
            f"{folder}: config.json names {name!r} as its weights (transformers_weights); write a .safetensors file or "
            "an index beside it, or remove the key"
        )
    return name


def _beside_single(folder: Path, single: Path, index: Path) -> list[str]:
    """Returns the names of the files ignored beside a file that holds the whole model. WorkError if shards of an index
    hold another model."""
    if not index.is_file():
        return []
    shards = [folder / name for name in indexed_files(index) if (folder / name).is_file() and folder / name != single]
    if shards:
        whole, parts = read_header(single), read_headers(shards)
        differs = next((name for name in {**whole, **parts} if not _equal(whole.get(name), parts.get(name))), None)
        if differs is not None:
            raise WorkError(
                f"{folder} holds two models: {single.name} and the {len(shards)} shards of {index.name}, which differ in "
                f"{differs}; remove the one that is not meant (transformers loads {single.name})"
            )
    return [index.name if shards else f"{index.name}, whose shards are not there"]


def _equal(one: TensorInfo | None, other: TensorInfo | None) -> bool:
    return one is not None and other is not None and _same(one, other)


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    """Compares two tensors in files, byte by byte."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    return _same_bytes(_place(one), _place(other))


_Place = tuple[Path, int, int, int, int]


def _place(info: TensorInfo) -> _Place:
    stat = info.file.stat()
    return info.file, info.start, info.nbytes, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1 << 16)
def _same_bytes(one: _Place, other: _Place) -> bool:
    """Compares two pieces of files; cached, because a command asks several times about the same files."""
    return all(a == b for a, b in itertools.zip_longest(_pieces(*one[:3]), _pieces(*other[:3])))


def _pieces(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as handle:
        handle.seek(start)
        while length:
            piece = handle.read(min(length, _PIECE))
            if not piece:
                return
            length -= len(piece)
            yield piece


def _names(paths: Sequence[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{len(paths)} shards"


def _words(error: Exception) -> str:
    """Describes an error on one line; an operating system's error without the path, which the message already has."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
