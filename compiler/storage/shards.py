"""Writes the weight files of a checkpoint: shards, each header first and a tensor at a time, and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minitron.compiler.storage.tensors import Entry, TensorWriter, in_file_order
from minitron.specs.atomic import atomic_path
from minitron.specs.weight_files import INDEX

SHARD_BYTES = 2 << 30  # of one file; in memory is one tensor at a time


def write_shards(
    folder: Path, entries: Sequence[Entry], make: Callable[[str], torch.Tensor], advance: Callable[[int], None]
) -> None:
    """Writes the tensors of `entries`, which `make` gives by name when their turn comes. Only a larger tensor makes a file of
    more than SHARD_BYTES; where there are several files, the index says which tensor is where. Each file is whole or not
    there; one that is there, because a process that was killed had written it, stays."""
    from huggingface_hub import split_torch_state_dict_into_shards

    with torch.device("meta"):
        planned = {one.name: torch.empty(one.shape, dtype=one.dtype) for one in entries}
    split, by_name = (
        split_torch_state_dict_into_shards(planned, max_shard_size=SHARD_BYTES),
        {e.name: e for e in entries},
    )
    for file, names in split.filename_to_tensors.items():
        ordered = in_file_order(by_name[name] for name in names)
        if (folder / file).is_file():
            advance(sum(entry.nbytes for entry in ordered))
            continue
        with atomic_path(folder / file) as temporary, temporary.open("wb") as handle:
            writer = TensorWriter(handle, ordered, {"format": "pt"})
            for entry in ordered:
                writer.write(make(entry.name))
                advance(entry.nbytes)
            writer.end()
    if split.is_sharded:
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
