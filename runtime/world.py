"""The processes that train together. One process alone is a world of size 1, in which all of this costs nothing.

Data parallel: every rank computes its share of each global batch, and gradients are summed. What is divided by the
global count of valid tokens before it is summed needs no other treatment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minitron.runtime.devices import pick_device
from minitron.specs.errors import MinitronError, UsageError
from minitron.specs.locks import only_one

T = TypeVar("T")

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Beside a GPU the CPU has a backend too: weights that rest in host memory are reduced there."""

_PATIENCE = timedelta(days=2)
"""While the leader tokenizes or one rank writes, the others wait. That is no failure, as it is where a step hangs."""


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, this one working on `device`."""

    rank: int
    size: int
    device: torch.device
    waiting: Any = None
    """The group of all ranks over the CPU in which they wait for each other, however long that takes."""

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
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is so on any rank."""
        if self.size == 1:
            return flags
        counts = self.sum(torch.tensor([float(flag) for flag in flags], device=self.device))
        return tuple(bool(count) for count in counts.tolist())

    def most(self, count: int) -> int:
        """The largest of all ranks' counts."""
        if self.size == 1:
            return count
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def mesh(self) -> DeviceMesh:
        """All ranks in a row, to spread tensors over. A world of one can have one too."""
        if not dist.is_initialized():
            dist.init_process_group(_BACKENDS[self.device.type], store=HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, (self.size,))

    def from_leader(self, work: Callable[[], T]) -> T:
        """What `work` yields, which the leader alone does. An error of ours is raised on all ranks."""
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except MinitronError as error:
                if self.size == 1:
                    raise
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.waiting)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def leader_first(self, work: Callable[[], T]) -> T:
        """What `work` yields: the leader does it alone, then all others do it and find what it left on the disk. An error
        of the leader is raised on all ranks."""
        done: list[T] = []
        self.from_leader(lambda: done.append(work()))
        return done[0] if self.leads else work()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self.waiting)


@contextmanager
def locked(world: World, doing: str, *folders: Path) -> Iterator[None]:
    """Keeps other processes from writing into the folders: the leader holds their locks, and where another process has one
    all ranks raise. UsageError and WorkError as for `only_one`."""
    with ExitStack() as stack:

        def lock() -> None:
            for folder in folders:
                stack.enter_context(only_one(folder, doing))

        world.from_leader(lock)
        yield


@contextmanager
def join_world(device: str | None) -> Iterator[World]:
    """The world that torchrun started this process into, or a world of one. The one place where its variables are
    read."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        try:
            yield World(0, 1, chosen)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise UsageError("WORLD_SIZE is set without RANK and MASTER_ADDR; start with torchrun, or unset WORLD_SIZE")
    if device is not None and ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", size)) > 1:
        raise UsageError(
            f"--device {device} is one device for several processes; write cuda: each takes one of its own"
        )
    dist.init_process_group(_BACKENDS[chosen.type])
    waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    dist.barrier(
        group=waiting
    )  # all are connected now: a rank that refuses the plan at once is not one that another cannot reach
    try:
        yield World(dist.get_rank(), size, chosen, waiting)
    except BaseException:
        # With a GPU, leaving in order waits for what the other ranks have not sent and may never send: the end of this
        # process, which is near, takes the connections down.
        if chosen.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
