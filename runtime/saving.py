"""Checkpoints written beside the training: a copy in host memory is made between two steps, and a thread of each rank
writes it while the next steps run. Ranks exchange their progress at every step; once all parts are written, the
checkpoint is published.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from torch import Tensor

from minitron.runtime.checkpoint import Checkpoints, TrainerState
from minitron.runtime.pieces import Piece
from minitron.runtime.world import World
from minitron.specs.atomic import explain
from minitron.specs.errors import WorkError

Identity = Mapping[str, object]
Pieces = Mapping[str, Mapping[str, Piece]]


@dataclass
class _Save:
    """One checkpoint that is being written."""

    state: TrainerState
    held_out_loss: float | None
    thread: threading.Thread | None = None
    error: Exception | None = None
    published: bool = False
    """True once the leader has been told to publish the checkpoint; the same on every rank."""


class Saver:
    """Saves checkpoints, at most one at a time. All ranks make the same calls in the same order."""

    def __init__(self, checkpoints: Checkpoints, identity: Identity, world: World, *, spread: bool) -> None:
        """Takes `spread`: true where every rank has a part to write; else the leader has everything."""
        self.checkpoints, self.identity, self.world = checkpoints, identity, world
        self.parts = world.size if spread else 1
        self._writes = spread or world.leads
        self._save: _Save | None = None
        self._buffers: dict[str, Tensor] = {}

    def status(self) -> tuple[bool, bool]:
        """Tells whether this rank's part of a checkpoint is still being written, and whether writing has failed."""
        # In this order: a thread that has ended has said whether it failed.
        writing = self._save is not None and self._save.thread is not None and self._save.thread.is_alive()
        return writing, self._save is not None and self._save.error is not None

    def start(self, state: TrainerState, pieces: Pieces, held_out_loss: float | None) -> None:
        """Copies `pieces`, which may change as soon as this method returns, and begins to write them. Waits first for
        the previous checkpoint if it is still being written.
        """
        self.finish()
        self._save = save = _Save(state, held_out_loss)
        if self._writes:
            copies = self._copy(pieces)
            # A daemon: a user who interrupts twice does not want to wait for it, and what it leaves is removed later.
            save.thread = threading.Thread(target=self._write, args=(save, copies), daemon=True)
            save.thread.start()

    def _write(self, save: _Save, pieces: Pieces) -> None:
        try:
            self.checkpoints.write_part(save.state, self.world.rank, self.parts, pieces)
        except Exception as error:  # raised again by the thread that trains
            save.error = error

    def settle(self, *, writing: bool, failed: bool) -> None:
        """Publishes a checkpoint whose parts are all written; called between two steps with the `status` of all ranks
        combined. WorkError on every rank where one has failed.
        """
        if (save := self._save) is None:
            return
        if failed:
            raise self._failure(save)
        if save.published:
            self._save = None
        elif not writing:
            self._publish(save)

    def finish(self) -> None:
        """Waits until no checkpoint is being written. WorkError on every rank where one has failed."""
        if (save := self._save) is None:
            return
        if save.thread is not None:
            save.thread.join()
        self.world.wait()
        if not save.published and not self.world.any(save.error is not None):
            self._publish(save)
        if self.world.any(save.error is not None):
            raise self._failure(save)
        self._save = None

    def _publish(self, save: _Save) -> None:
        """Publishes a checkpoint on the leader. Errors are raised by all ranks together, or they would wait for each
        other.
        """
        save.published = True
        if self.world.leads:
            try:
                self.checkpoints.publish(save.state, self.parts, self.identity, save.held_out_loss)
            except Exception as error:
                save.error = error

    def _failure(self, save: _Save) -> Exception:
        """Returns the exception to raise, and removes the partly written files, so that there is space for the user's
        next attempt.
        """
        self._save = None
        checkpoints = self.checkpoints
        if self.world.leads:
            shutil.rmtree(checkpoints.unfinished(save.state), ignore_errors=True)
        if save.error is None:
            return WorkError(f"another process could not write its part of the checkpoint of step {save.state.step}")
        if not isinstance(save.error, OSError | SafetensorError):
            return save.error
        there = checkpoints.names()
        kept = f"the last good one, {there[0]}, was kept" if there else "there is no earlier one"
        reason, remedy = explain(save.error)
        then = "train again: it goes on from there" if there else "train again"
        return WorkError(
            f"the checkpoint of step {save.state.step} could not be written to {checkpoints.folder}: {reason}; {kept}. "
            f"{remedy[0].upper()}{remedy[1:]} and {then}"
        )

    def _copy(self, pieces: Pieces) -> Pieces:
        """Copies the pieces into buffers in host memory that the next checkpoint reuses."""
        copies = {
            kind: {
                name: replace(piece, tensor=self._to_host(f"{kind}/{name}", piece.tensor)) for name, piece in of.items()
            }
            for kind, of in pieces.items()
        }
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return copies

    def _to_host(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None:
            # Only pinned memory is copied to at the speed of the bus.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)
