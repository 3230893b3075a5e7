"""Puts the weights of a segment on the device, and reads those of the next one meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from minitron.compiler.graph.calls import Settings
from minitron.compiler.graph.memory import apart_from_heap, release_heap
from minitron.compiler.graph.names import Fetch, strip_wrapper

# Bytes of weights: behind a segment of fewer, giving back is not worth the few milliseconds that it takes.
LEAST_RELEASED = 8 << 20


@dataclass(frozen=True)
class Feeding:
    """The memory that weights may take.

    resident  every weight stays on the device once it was read, for passes to come
    ahead     a thread reads the weights of the next segment, and on CUDA copies them from pinned memory, while one computes
    apart     no two matrices are in memory together: for a few batches, which wait between two as others do between layers
    """

    resident: bool = False
    ahead: bool = False
    apart: bool = False


@dataclass(frozen=True)
class _Read:
    """A tensor as it was read, or on the device already; `event` ends the copy that was started for it, `held` is what the
    copy reads from."""

    tensor: torch.Tensor
    event: Any = None
    held: torch.Tensor | None = None


class WeightFeed:
    """Fetches weights by name in the dtype of `settings`. Those of `shared` are kept for the rest of a pass."""

    def __init__(
        self,
        fetch: Fetch,
        buffers: Mapping[str, torch.Tensor],
        settings: Settings,
        shared: Collection[str],
        feeding: Feeding = Feeding(),
    ) -> None:
        self._fetch, self._buffers, self._settings, self._shared = fetch, buffers, settings, shared
        self._feeding = feeding
        self._kept: dict[str, torch.Tensor] = {}
        self._asked: dict[str, Future[_Read]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stream: Any = None

    def take(self, nodes: Iterable[Node]) -> dict[Node, torch.Tensor]:
        """The weights that these nodes name, on the device. Errors of reading are raised here."""
        with apart_from_heap():
            return {node: self.one(node) for node in nodes}

    def one(self, node: Node) -> torch.Tensor:
        """The weight or buffer that a node names, on the device."""
        name = strip_wrapper(str(node.target))
        if name in self._kept:
            return self._kept[name]
        asked = self._asked.pop(name, None)
        value = self._placed(name, self._read(name) if asked is None else asked.result())
        if name in self._shared or self._feeding.resident:
            self._kept[name] = value
        return value

    def ask(self, nodes: Iterable[Node]) -> None:
        """Has a thread read what `take` is going to be asked for."""
        if not self._feeding.ahead:
            return
        for name in (strip_wrapper(str(node.target)) for node in nodes):
            if name not in self._kept and name not in self._asked and name not in self._buffers:
                self._pool = self._pool or ThreadPoolExecutor(1, "weights")
                self._asked[name] = self._pool.submit(self._read_ahead, name)

    def leave(self, weights: dict[Node, torch.Tensor]) -> None:
        """Lets the weights of a segment go, and gives back what its activations left on the heap."""
        freed = sum(value.nbytes for value in weights.values())
        weights.clear()
        if freed >= LEAST_RELEASED and not self._feeding.resident and torch.device(self._settings.device).type == "cpu":
            release_heap()

    def end(self) -> None:
        """Ends a pass: the thread stops, and only resident weights stay."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._asked.clear()
        if not self._feeding.resident:
            self._kept.clear()

    def _read(self, name: str) -> _Read:
        return _Read(self._buffers[name] if name in self._buffers else self._fetch(name))

    def _read_ahead(self, name: str) -> _Read:
        """Runs in the thread. The copy to the device is started there, on a stream of its own."""
        with apart_from_heap():
            value = self._fetch(name)
        if torch.device(self._settings.device).type != "cuda":
            return _Read(value)
        pinned = value.pin_memory()
        with torch.cuda.device(self._settings.device):
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                copied = pinned.to(self._settings.device, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
        return _Read(copied, event, pinned)

    def _placed(self, name: str, read: _Read) -> torch.Tensor:
        """The tensor on the device and in the dtype that graphs run in; buffers keep the dtype that their code gave them."""
        value = read.tensor
        if read.event is not None:
            current = torch.cuda.current_stream(value.device)
            current.wait_event(read.event)
            value.record_stream(current)  # its memory is another stream's, which must not reuse it too early
        floats = value.dtype.is_floating_point and name not in self._buffers
        return value.to(device=self._settings.device, dtype=self._settings.dtype if floats else None)
