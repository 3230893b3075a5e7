"""The processes that train together. A single process is a world of size 1, in which none of this costs anything.

Training is data parallel: every rank computes its share of each global batch, and gradients are summed. Each share is
divided by the global count of valid tokens before the sum, so that the sum is the global mean.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minitron.runtime.devices import pick_device
from minitron.runtime.launch import end_with_launcher
from minitron.specs.errors import MinitronError, OtherProcessEnded, UsageError, WorkError, first_line
from minitron.specs.locks import only_one

T = TypeVar("T")

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""The backends by device type. Next to a GPU the CPU has a backend too: weights that rest in host memory are reduced
there.
"""

_POLL_SECONDS = 0.1

_PATIENCE = timedelta(days=2)
"""The time that ranks wait while the leader tokenizes or one rank writes. Such a wait is not a failure; a step that hangs
is.
"""


_MEETING = timedelta(minutes=10)
"""The time in which processes that are started together must reach their store."""


@dataclass(frozen=True)
class World:
    """A group of `size` processes, as seen from the one with number `rank`, which works on `device`."""

    rank: int
    size: int
    device: torch.device
    waiting: Any = None
    """The group of all ranks over the CPU in which they wait for each other, however long the wait takes."""

    local_rank: int = 0
    """The number of this process among those of its machine."""

    @property
    def leads(self) -> bool:
        """Tells whether this process writes files and prints messages."""
        return self.rank == 0

    def share(self, samples: range) -> range:
        """Returns this rank's part of consecutive global samples; their number is a multiple of `size`."""
        each = len(samples) // self.size
        return samples[self.rank * each : (self.rank + 1) * each]

    def sum(self, value: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Tells whether the flag is set on any rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Tells for each flag whether it is set on any rank."""
        return tuple(count > 0 for count in self.total(*flags))

    def total(self, *counts: int) -> tuple[int, ...]:
        """Sums the counts over all ranks. The counts are exchanged between hosts, so that nothing waits for a GPU."""
        if self.size == 1:
            return counts
        sums = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(sums, group=self.waiting)
        return tuple(sums.tolist())

    def most(self, count: int) -> int:
        """Returns the largest of all ranks' counts."""
        if self.size == 1:
            return count
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def mesh(self) -> DeviceMesh:
        """Returns the mesh of all ranks in one dimension, for sharding tensors. A world of one can have one too."""
        if not dist.is_initialized():
            dist.init_process_group(_BACKENDS[self.device.type], store=HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, (self.size,))

    def from_leader(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`, which the leader alone calls. The leader's own errors are raised on all
        ranks.
        """
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except MinitronError as error:
                if self.size == 1:
                    raise
                outcome[1] = error
        if self.size > 1:
            self.wait()  # for as long as the work takes, and open to signals; what follows takes no time
            dist.broadcast_object_list(outcome, src=0, group=self.waiting)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def leader_first(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`: the leader calls it first, then all others call it and find the leader's files
        on disk. An error of the leader is raised on all ranks.
        """
        done: list[T] = []
        self.from_leader(lambda: done.append(work()))
        return done[0] if self.leads else work()

    def raise_together(self, error: MinitronError | None) -> None:
        """Raises on all ranks the error of the first of them that has one."""
        errors: list[MinitronError | None] = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error, group=self.waiting)
        if first := next((one for one in errors if one is not None), None):
            raise first

    def wait(self) -> None:
        """Waits until all ranks have called this method."""
        if self.size > 1:
            arrived, pause = dist.barrier(group=self.waiting, async_op=True), 1e-4
            assert arrived is not None
            while not arrived.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, _POLL_SECONDS)
            arrived.wait()


@contextmanager
def locked(world: World, doing: str, *folders: Path) -> Iterator[None]:
    """Keeps other processes from writing into the folders: the leader holds their locks, and where another process
    holds one, all ranks raise. UsageError and WorkError as for `only_one`.
    """
    with ExitStack() as stack:

        def lock() -> None:
            for folder in folders:
                stack.enter_context(only_one(folder, doing))

        world.from_leader(lock)
        yield


@contextmanager
def join_world(device: str | None) -> Iterator[World]:
    """Joins the world that torchrun started this process into, or a world of one. The environment variables of torchrun
    are read here and nowhere else.
    """
    end_with_launcher()
    size = _number("WORLD_SIZE", 1)
    chosen = pick_device(device, _number("LOCAL_RANK", 0) if size > 1 else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        try:
            yield World(0, 1, chosen)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    _require_torchrun(size)
    if device is not None and ":" in device and _number("LOCAL_WORLD_SIZE", size) > 1:
        raise UsageError(
            f"--device {device} is one device for several processes; write cuda: each takes one of its own"
        )
    waiting = _aside(lambda: _connect(chosen))
    try:
        yield World(dist.get_rank(), size, chosen, waiting, _number("LOCAL_RANK", 0))
    except BaseException as error:
        # With a GPU, leaving in order waits for what the other ranks have not sent and may never send: the end of this
        # process, which is near, takes the connections down.
        if chosen.type == "cpu":
            dist.destroy_process_group()
        if _is_of_another(error):
            raise OtherProcessEnded(_ENDED) from None
        raise
    dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """Reads a variable of the environment that torchrun sets. UsageError for a value that is not a count."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or (name.endswith("SIZE") and int(text) == 0):
        raise UsageError(
            f"{name} is `{text}` in the environment, and a whole number is wanted; start with torchrun, or unset it"
        )
    return int(text)


def _require_torchrun(size: int) -> None:
    """Checks the variables that each of several processes needs. UsageError where they are missing or inconsistent."""
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise UsageError("WORLD_SIZE is set without RANK and MASTER_ADDR; start with torchrun, or unset WORLD_SIZE")
    if (rank := _number("RANK", 0)) >= size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {size}; ranks are counted from 0: start with torchrun")
    _number("MASTER_PORT", 0)
    if _shared_attempt() > 0 and _number("GROUP_WORLD_SIZE", 1) > 1:
        raise UsageError(
            "torchrun's restarts on several machines need `export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` on each of them before "
            "torchrun; set it, or leave --max-restarts out and start the training again"
        )


def _shared_attempt() -> int:
    """Returns the number of restarts before this attempt, where torchrun keeps one store for all of them; else 0."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _number("TORCHELASTIC_RESTART_COUNT", 0) if shared else 0


def _connect(device: torch.device) -> Any:
    """Joins the other processes and returns the group in which ranks wait for each other. WorkError where they cannot
    be reached.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    try:
        _init_process_group(device)
        waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
        # All are connected now: a rank that refuses the plan at once is not one that another cannot reach.
        dist.barrier(group=waiting)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WorkError(
            f"the processes of this training did not find each other at {where} ({first_line(error)}); see that all of them "
            "run and can reach that address"
        ) from None
    return waiting


def _init_process_group(device: torch.device) -> None:
    """Joins the default group of the processes that torchrun has started.

    torchrun keeps one store for all of its attempts (torch 2.13), and torch reads it as if each attempt had one of its
    own: after a restart processes find the addresses of those that are gone. So a later attempt has its own place there.
    Attempts are counted on each machine; several machines need a store for each attempt, which torchrun can be told.
    """
    attempt = _shared_attempt()
    if attempt == 0:
        dist.init_process_group(_BACKENDS[device.type])
        return
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    place = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    shared = TCPStore(*place, size, is_master=False, timeout=_MEETING)
    dist.init_process_group(
        _BACKENDS[device.type], store=PrefixStore(f"attempt-{attempt}", shared), rank=rank, world_size=size
    )


def _aside(work: Callable[[], T]) -> T:
    """Returns the result of `work`, called in a thread: signals are delivered between two steps of Python, and a call
    that waits for other processes would delay them.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
    if failed:
        raise failed[0]
    return done[0]


_ENDED = (
    "another process of this training has ended, killed or for a reason that it says itself; start the training again: it "
    "goes on from the last checkpoint"
)
_CONNECTION_LOST = ("closed by peer", "reset by peer", "broken pipe", "nccl", "connection refused", "socket timeout")


def _is_of_another(error: BaseException) -> bool:
    """Checks whether an error of torch's communication means that another process has ended."""
    if isinstance(error, MinitronError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _CONNECTION_LOST)
