"""Writes tensors of other checkpoints, under other names, as the weight files of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron.specs.errors import WorkError
from minitron.specs.weight_files import INDEX, SINGLE, TensorInfo

SHARD_BYTES = 2 << 30  # the largest weight file, but for one of a single larger tensor; it is held in memory


@dataclass(frozen=True)
class Taken:
    """A tensor of another checkpoint: where it lies, its name there, and what is made of it."""

    info: TensorInfo
    stored: str
    change: Callable[[torch.Tensor], torch.Tensor] | None = None

    def read(self) -> torch.Tensor:
        """Returns the tensor as it is written. WorkError where its file cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.info.file, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(self.stored)
        except (SafetensorError, OSError) as error:
            raise WorkError(f"{self.info.file}: cannot read {self.stored} ({error})") from None
        return tensor if self.change is None else self.change(tensor).contiguous()


def write_weights(folder: Path, taken: Mapping[str, Taken], advance: Callable[[int], None]) -> None:
    """Writes the tensors by name, in files of at most SHARD_BYTES each, with the index where there are several."""
    from safetensors.torch import save_file

    shards = list(_shards(taken))
    total, weight_map = 0, {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: taken[name].read() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        total += size
        weight_map.update(dict.fromkeys(names, file))
        advance(size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(taken: Mapping[str, Taken]) -> Iterator[list[str]]:
    """The names of each weight file, in the order in which the tensors lie in the files that they come from."""
    names: list[str] = []
    size = 0
    for name, one in taken.items():
        if names and size + one.info.nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += one.info.nbytes
    if names:
        yield names
