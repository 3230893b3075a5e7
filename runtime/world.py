"""The processes that train together. One process alone is a world of size 1, in which all of this costs nothing.

Data parallel: every rank holds the whole student, computes its share of each global batch, and gradients are
summed. What is divided by the global count of valid tokens before it is summed needs no other treatment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.runtime.devices import pick_device
from minitron.specs.errors import UsageError


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, this one working on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, samples: range) -> range:
        """This rank's part of consecutive global samples; their number is a multiple of `size`."""
        each = len(samples) // self.size
        return samples[self.rank * each : (self.rank + 1) * each]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs the body alone, then all others run it and find what it left on the disk."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str | None) -> Iterator[World]:
    """The world that torchrun started this process into, or a world of one. The one place where its variables are
    read."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise UsageError("WORLD_SIZE is set without RANK and MASTER_ADDR; start with torchrun, or unset WORLD_SIZE")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    dist.barrier()  # all are connected now: a rank that refuses the plan at once is not one that another cannot reach
    try:
        yield World(dist.get_rank(), size, chosen)
    finally:
        dist.destroy_process_group()
