"""Keeps the values of each batch between two segments: in memory, or where they do not fit, in files.

A batch has a lane for each function that it runs through: number 0 is the graph itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from minitron.compiler.storage.tensors import save_tensors

Values = dict[str, Any]
"""The values of one batch that later segments read, by node name: tensors, and whatever else a node may yield."""

Slot = tuple[int, int]
"""The number of a batch and of its lane."""


class Streams(Protocol):
    """The values of each batch between two segments."""

    def get(self, slot: Slot) -> Values:
        """The values of a batch; none before the first segment."""

    def put(self, slot: Slot, values: Values) -> None:
        """Replaces the values of a batch."""

    def drop(self) -> None:
        """Forgets everything."""

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
        """Returns the tensors and the versions of files from which another process can go on here. None where the values
        cannot be kept."""

    def keep(self) -> None:
        """Keeps the files that `saved` named, until the next call."""

    def restore(self, tensors: Mapping[str, torch.Tensor], versions: Mapping[str, int]) -> bool:
        """Takes up what was kept; False where it is not there any more."""


class MemoryStreams:
    """Values in memory. `resting` is the device between two segments where that is not the one that computes."""

    def __init__(self, device: str = "cpu", resting: str | None = None) -> None:
        self._device, self._resting = device, resting
        self._values: dict[Slot, Values] = {}

    def get(self, slot: Slot) -> Values:
        values = self._values.get(slot, {})
        if self._resting is None:
            return values
        return {name: moved(value, self._device) for name, value in values.items()}

    def put(self, slot: Slot, values: Values) -> None:
        if self._resting is not None:
            values = {name: _rested(value) for name, value in values.items()}
        self._values[slot] = values

    def drop(self) -> None:
        self._values.clear()

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
        tensors: dict[str, torch.Tensor] = {}
        for (number, lane), values in self._values.items():
            for name, value in values.items():
                if not isinstance(value, torch.Tensor):
                    return None
                tensors[f"{number}/{lane}/{name}"] = value
        return tensors, {}

    def keep(self) -> None:
        pass

    def restore(self, tensors: Mapping[str, torch.Tensor], versions: Mapping[str, int]) -> bool:
        for key, value in tensors.items():
            number, lane, name = key.split("/", 2)
            here = value.to(self._device) if self._resting is None else _rested(value)
            self._values.setdefault((int(number), int(lane)), {})[name] = here
        return True


def moved(value: Any, device: str) -> Any:
    """A tensor moved to a device; any other value as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _rested(value: Any) -> Any:
    """A tensor in host memory, pinned where there is a device to copy it to."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.cpu()
    return value.pin_memory() if torch.cuda.is_available() else value


class FileStreams:
    """Values in files of a folder, one for each batch and version. Those that were `saved` last stay until the next time."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._device = folder, device
        self._versions: dict[Slot, int] = {}
        self._kept: dict[Slot, int] = {}
        self._others: dict[Slot, Values] = {}  # values that are not tensors

    def get(self, slot: Slot) -> Values:
        if slot not in self._versions:
            return {}
        with safe_open(self._path(slot, self._versions[slot]), framework="pt") as handle:
            # Copied: the bytes of a mapped file change when it is written again.
            read = {name: handle.get_tensor(name).clone().to(self._device) for name in handle.keys()}  # noqa: SIM118
        return read | self._others.get(slot, {})

    def put(self, slot: Slot, values: Values) -> None:
        old = self._versions.get(slot)
        version = 0 if old is None else old + 1
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        self._others[slot] = {name: value for name, value in values.items() if name not in tensors}
        try:
            save_tensors(self._path(slot, version), tensors, {})
        except OSError as error:
            error.filename = str(self._folder)
            raise
        self._versions[slot] = version
        if old is not None and self._kept.get(slot) != old:
            self._path(slot, old).unlink(missing_ok=True)

    def drop(self) -> None:
        self._versions.clear()
        self._kept.clear()
        self._others.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
        if any(self._others.values()):
            return None
        return {}, {f"{number}/{lane}": version for (number, lane), version in self._versions.items()}

    def keep(self) -> None:
        """Keeps the files of now, whose versions were saved, in the place of those that were kept before."""
        self._kept = dict(self._versions)
        current = {self._path(slot, version).name for slot, version in self._versions.items()}
        for path in self._folder.iterdir():
            if path.name not in current:
                path.unlink(missing_ok=True)

    def restore(self, tensors: Mapping[str, torch.Tensor], versions: Mapping[str, int]) -> bool:
        found = {(int(a), int(b)): version for key, version in versions.items() for a, b in [key.split("/")]}
        if not all(self._path(slot, version).is_file() for slot, version in found.items()):
            return False
        self._versions = found
        self.keep()
        return True

    def _path(self, slot: Slot, version: int) -> Path:
        return self._folder / f"{slot[0]}-{slot[1]}-{version}.safetensors"
