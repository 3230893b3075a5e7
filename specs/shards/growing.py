"""Reads a stream while another process writes it."""

from __future__ import annotations

import json
from pathlib import Path

from minitron.specs.shards.stream import (
    INDEX,
    NOTHING,
    Largest,
    ShardIndex,
    Shards,
    append_shard,
    read_shard_index,
)


class GrowingStream:
    """The shards of a folder that are there, in order from the first; `poll` takes in those that have appeared since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens, self.learnt = Shards([], [], folder, "tokens"), Shards([], [], folder, "learnt")
        self.number = self.documents = 0
        self.largest: Largest = NOTHING
        self.ended = False
        """True once all shards are there."""

    def __len__(self) -> int:
        return len(self.tokens)

    def poll(self) -> list[ShardIndex]:
        """Takes in the shards that have appeared, and returns their indices."""
        if self.ended:
            return []
        count = _shards_in_all(self.folder)
        found = []
        while (index := _index(self.folder, self.number)) is not None:
            try:
                append_shard(self.tokens, self.learnt, self.number, index)
            except (OSError, ValueError):  # removed since the index was read, and made again by whoever needs it
                break
            found.append(index)
            self.number, self.documents = self.number + 1, index.documents
            if index.largest.id > self.largest.id:
                self.largest = index.largest
        self.ended = self.number == count
        return found

    def reaches(self, until: int | None) -> bool:
        """Checks whether `until` tokens are there, or all that will ever be."""
        return self.ended or (until is not None and len(self) >= until)


def _index(folder: Path, number: int) -> ShardIndex | None:
    """Reads the index of a shard; None where the shard is not there yet, or is to be made again."""
    try:
        return read_shard_index(folder, number)
    except (OSError, ValueError):
        return None


def _shards_in_all(folder: Path) -> int | None:
    """Returns the number of shards that `stream.json` tells; None where it is not there yet."""
    try:
        return int(json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
