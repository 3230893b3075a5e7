"""The progress of a calibration, saved from time to time, so that one that was killed goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from minitron.compiler.graph.executor import Place
from minitron.compiler.graph.streams import Streams
from minitron.compiler.importance.room import Room
from minitron.compiler.importance.tensor_file import read_about, read_tensors, write_tensors

# Seconds of work that a killed calibration loses at most, plus what saving takes; and saving takes a tenth of the time at most.
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.1

_STREAM = "stream/"


def _room_of(metadata: Mapping[str, str]) -> Room:
    return Room(**json.loads(metadata["room"]))


@dataclass(frozen=True)
class Interrupted:
    """The file that keeps what a calibration has accumulated so far; `key` identifies the calibration that may go on."""

    path: Path
    key: str

    def room(self) -> Room | None:
        """The room that was taken so far, where there is something to go on with."""
        metadata = read_about(self.path, self.key)
        return None if metadata is None else _room_of(metadata)

    def remove(self) -> None:
        """Forgets what was saved."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Saved:
    """The progress of an earlier process: `phase` is the pass that it was in, `block` the first batch of its block,
    `place` how far that block has come. `state` is what was accumulated."""

    phase: str
    block: int
    place: Place
    state: Mapping[str, torch.Tensor]


class SaveTimer:
    """Tells when to save: at most every SAVE_SECONDS, less often where saving takes long. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._due = clock, clock() + SAVE_SECONDS

    def due(self) -> bool:
        """Tells whether it is time to save."""
        return self._clock() >= self._due

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measures what saving takes."""
        began = self._clock()
        yield
        ended = self._clock()
        self._due = ended + max(SAVE_SECONDS, (ended - began) / SAVE_SHARE)


@dataclass(frozen=True)
class ProgressFile:
    """Saves what a calibration has done when the `timer` says so. `room` is what the calibration takes, which one that goes on
    must take as well."""

    saved: Interrupted
    room: Room
    timer: SaveTimer = field(default_factory=SaveTimer)

    def save(self, now: Saved, streams: Streams) -> None:
        """Saves what was accumulated and what is known of each batch; nothing where that cannot be saved."""
        with self.timer.saving():
            self._save(now, streams)

    def _save(self, now: Saved, streams: Streams) -> None:
        found = streams.saved()
        if found is not None:
            tensors, versions = found
            state = {f"state/{name}": value for name, value in now.state.items()}
            write_tensors(
                self.saved.path,
                self.saved.key,
                state | {_STREAM + name: value for name, value in tensors.items()},
                done=json.dumps([now.phase, now.block, now.place.segment, now.place.batch]),
                versions=json.dumps(versions),
                room=json.dumps(asdict(self.room)),
            )
            streams.keep()

    def read(self, streams: Streams) -> Saved | None:
        """Reads what an earlier process saved, of which `streams` take their part; None where there is nothing that fits."""
        found = read_tensors(self.saved.path, self.saved.key)  # what a damaged file held is computed again
        if found is None or _room_of(found[1]) != self.room:
            return None
        phase, block, segment, batch = json.loads(found[1]["done"])
        # Copied: the file is replaced while its tensors are in use.
        tensors, versions = {name: one.clone() for name, one in found[0].items()}, json.loads(found[1]["versions"])
        state = {name.removeprefix("state/"): one for name, one in tensors.items() if not name.startswith(_STREAM)}
        rest = {name.removeprefix(_STREAM): one for name, one in tensors.items() if name.startswith(_STREAM)}
        if not streams.restore(rest, versions):
            return None
        return Saved(phase, block, Place(segment, batch), state)
