"""Tensors in a file that says what they were made from and carries a checksum of their bytes: a changed bit is noticed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from minitron.compiler.storage.tensors import save_tensors
from minitron.specs.atomic import atomic_path

_ABOUT, _KEY, _CHECKSUM = "about", "key", "crc32"


def write_tensors(path: Path, key: str, tensors: Mapping[str, torch.Tensor], **more: str) -> None:
    """Writes the tensors whole or not at all; `key` says what they were made from, `more` stands beside it."""
    metadata = {_KEY: key, **more}
    # One entry: several come out in any order, and equal tensors would not be equal files.
    about = json.dumps(metadata | {_CHECKSUM: _checksum(tensors, metadata)})
    with atomic_path(path) as temporary:
        save_tensors(temporary, tensors, {_ABOUT: about})


def read_tensors(path: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Reads tensors and metadata; None where there is no file, it is damaged, or its key is another one."""
    from safetensors import SafetensorError, safe_open

    metadata = read_about(path, key)
    if metadata is None:
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    written = metadata.pop(_CHECKSUM, None)
    return (tensors, metadata) if written == _checksum(tensors, metadata) else None


def read_about(path: Path, key: str) -> dict[str, str] | None:
    """Reads the metadata alone, its checksum among them, which only `read_tensors` looks at; None as there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata: dict[str, str] = json.loads((handle.metadata() or {}).get(_ABOUT, "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    return metadata if metadata.get(_KEY) == key else None


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, values and metadata, as hexadecimal digits."""
    found = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        found = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), found)
        if tensors[name].numel():
            found = zlib.crc32(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
