"""The processes that calibrate together: each takes its share of the samples, and what they accumulate is summed.

A single process is a group of one, in which nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minitron.specs.errors import UsageError

T = TypeVar("T")

# One process reads the data or writes the student while the others wait.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """A group of `size` processes, seen from the one of number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Tells whether this process writes files and prints messages."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item: the shares differ by one item at most."""
        return list(items[self.rank :: self.size])

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the CPU in float64, where the order does not matter to a float32."""
        if self.size == 1:
            return value
        total = value.detach().cpu().double()
        dist.all_reduce(total)
        return total.to(value.dtype)

    def from_leader(self, value: Any) -> Any:
        """Returns the first process's value in all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def join_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """The group that torchrun started this process in, and the device of its own where `device` is that of all; a group of one
    where torchrun did not start it."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdigit() or int(said) < 1:
        raise UsageError(
            f"WORLD_SIZE is `{said}` in the environment, and a whole number is wanted; start with torchrun, or unset WORLD_SIZE"
        )
    size = int(said)
    if size == 1:
        yield Ranks(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    dist.init_process_group("gloo", timeout=PATIENCE)  # what is sent comes from the CPU
    try:
        yield Ranks(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()
