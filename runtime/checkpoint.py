"""Checkpoints: whole or not at all, checked when read, the newest good one wins.

    train/checkpoints/step-00000120/
        model-00001-of-00002.safetensors       master weights and buffers: the rows that rank 0 of 2 holds
        optimizer-00001-of-00002.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME; scales, where moments have 8 bits
        state.json                             step, samples, tokens, what training.yaml said, size and CRC of all files of
                                               all parts, and a CRC of state.json itself

A training whose weights are not spread over ranks writes one part, `model.safetensors`. There is no state of random
generators in it: order and dropout are functions of the seed and the sample index.

Why not torch.distributed.checkpoint: its index is a pickle, and only safetensors are read here; it has no checksums, so
that a damaged file would be trained on; and with one dimension of sharding the rows that a rank needs are a subtraction.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minitron.runtime.pieces import Piece, PieceFiles, header, model_pieces, piece_of, worth_writing
from minitron.runtime.sharding import rows_like
from minitron.runtime.world import World
from minitron.specs.atomic import publish_folder, remove_leftovers, temporary_path
from minitron.specs.builds import CHECKPOINT_STATE
from minitron.specs.errors import WorkError, first_line
from minitron.specs.progress import Progress

_FORMAT = 3
_CHUNK = 1 << 24
_KINDS = ("model", "optimizer")

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The exceptions that reading a damaged JSON document of ours may raise."""


@dataclass(frozen=True)
class TrainerState:
    """The progress of a training. Everything else follows from `samples`."""

    step: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One checkpoint folder, its state, and the content of the plan when the checkpoint was written."""

    folder: Path
    state: TrainerState
    identity: Mapping[str, Any]
    parts: int

    def files(self, kind: str) -> list[Path]:
        return [self.folder / _name(kind, part, self.parts) for part in range(self.parts)]


def _name(kind: str, part: int, parts: int, suffix: str = ".safetensors") -> str:
    return f"{kind}{suffix}" if parts == 1 else f"{kind}-{part + 1:05d}-of-{parts:05d}{suffix}"


class Checkpoints:
    """The checkpoints in `folder`: the last `keep` are kept, and with `keep_best` also the one with the lowest held-out
    loss.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool = False) -> None:
        self.folder, self.keep, self.keep_best = folder, keep, keep_best

    def names(self) -> list[Path]:
        """Returns all checkpoint folders, the newest first."""
        return sorted(self.folder.glob("step-" + 8 * "[0-9]"), reverse=True)

    def unfinished(self, state: TrainerState) -> Path:
        """Returns the folder in which all ranks write the parts of a checkpoint, until the checkpoint is complete and
        gets its name.
        """
        return temporary_path(self.folder / f"step-{state.step:08d}")

    def write_part(
        self, state: TrainerState, part: int, parts: int, tensors: Mapping[str, Mapping[str, Piece]]
    ) -> None:
        """Writes the part of one rank: `tensors` are the pieces of the model and of the optimizer, on the CPU.

        OSError and SafetensorError for a disk that is full or cannot be written to.
        """
        folder = self.unfinished(state)
        folder.mkdir(parents=True, exist_ok=True)
        measured = {}
        for kind in _KINDS:
            mine = dict(worth_writing(tensors[kind], first=part == 0))
            path = folder / _name(kind, part, parts)
            save_file({name: piece.tensor for name, piece in mine.items()}, path, header(mine))
            measured[path.name] = _measure(path)
            _sync(path)
        note = folder / _name("part", part, parts, ".json")
        note.write_text(json.dumps({"files": measured}, indent=1), encoding="utf-8")
        _sync(note)

    def publish(
        self, state: TrainerState, parts: int, identity: Mapping[str, Any], held_out_loss: float | None
    ) -> None:
        """Gives a checkpoint whose parts are all written its name, and removes checkpoints that are no longer kept."""
        folder = self.unfinished(state)
        files: dict[str, Any] = {}
        for part in range(parts):
            note = folder / _name("part", part, parts, ".json")
            files |= json.loads(note.read_text(encoding="utf-8"))["files"]
            note.unlink()
        document = {
            "format_version": _FORMAT, **asdict(state), "parts": parts, "held_out_loss": held_out_loss,
            "files": files, "identity": dict(identity),
        }  # fmt: skip
        text = json.dumps(document | {"crc32": _crc(document)}, indent=1)
        (folder / CHECKPOINT_STATE).write_text(text, encoding="utf-8")
        publish_folder(folder, self.folder / f"step-{state.step:08d}")
        for old in set(self.names()[self.keep :]) - {self.best()}:
            # Renamed first: what is half deleted must not look like a checkpoint.
            aside = temporary_path(old, "old")
            old.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def best(self) -> Path | None:
        """Returns the checkpoint with the lowest held-out loss, if best checkpoints are kept; of equal ones the
        newest.
        """
        losses = {}
        for folder in self.names() if self.keep_best else []:
            try:
                loss = _read_state(folder)["held_out_loss"]
            except UNREADABLE:
                continue
            if loss is not None and math.isfinite(loss):
                losses[folder] = loss
        return min(losses, key=losses.__getitem__, default=None)

    def newest(self, progress: Progress, world: World) -> TrainingCheckpoint | None:
        """Finds the newest checkpoint whose files are all intact; None where there is no checkpoint at all. All ranks
        call this method, and each reads its share of the files.

        Damaged checkpoints are put aside with a message, and older ones are tried. WorkError where all are damaged: a
        training is not restarted from the beginning unasked.
        """
        if world.leads:
            remove_leftovers(self.folder)
        world.wait()
        names, damaged = self.names(), dict[Path, str]()
        good = None
        for folder in names:
            problem = None
            try:
                good = _check(folder, world)
            except UNREADABLE as error:
                problem = first_line(error)
            if not world.any(problem is not None):
                break
            good, damaged[folder] = None, problem or "another process found it so"
        world.wait()
        if damaged and good is None:
            newest, reason = next(iter(damaged.items()))
            raise WorkError(
                f"every checkpoint in {self.folder} is damaged ({newest.name}: {reason}); delete that folder to begin again"
            )
        for folder, reason in damaged.items() if world.leads else ():
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            progress.message(f"the checkpoint {folder.name} is damaged ({reason}); it was put aside as {aside.name}")
        return good


def identity_of_newest(folder: Path) -> dict[str, Any] | None:
    """Returns the identity of the plan that the newest readable checkpoint in `folder` stores; weights are not read."""
    for one in Checkpoints(folder, keep=1).names():
        try:
            return dict(_read_state(one)["identity"])
        except UNREADABLE:
            continue
    return None


def _check(folder: Path, world: World) -> TrainingCheckpoint:
    """Reads the checkpoint in `folder` and compares this rank's share of the files with their checksums."""
    document = _read_state(folder)
    parts, files = document["parts"], document["files"]
    expected = {_name(kind, part, parts) for kind in _KINDS for part in range(parts)}
    if absent := sorted(expected - files.keys()):
        raise ValueError(f"it lists no {absent[0]}")
    for name in sorted(expected)[world.rank :: world.size]:
        if _measure(folder / name) != files[name]:
            raise ValueError(f"{name} is not what was written")
    state = TrainerState(document["step"], document["samples"], document["tokens"])
    return TrainingCheckpoint(folder, state, document["identity"], parts)


def _read_state(folder: Path) -> dict[str, Any]:
    """Reads the document of state.json. Raises one of UNREADABLE where the content is not what was written."""
    document: dict[str, Any] = json.loads((folder / CHECKPOINT_STATE).read_text(encoding="utf-8"))
    if document["format_version"] != _FORMAT:
        raise ValueError(f"its format is {document['format_version']}, this version reads {_FORMAT}")
    if _crc({key: value for key, value in document.items() if key != "crc32"}) != document["crc32"]:
        raise ValueError(f"{CHECKPOINT_STATE} is not what was written")
    if folder.name != f"step-{document['step']:08d}":
        raise ValueError(f"it is of step {document['step']}")
    return document


def _crc(document: Mapping[str, Any]) -> int:
    """Computes a checksum of a JSON document, independent of key order and whitespace."""
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _measure(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load(checkpoint: TrainingCheckpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the weights and the optimizer's moments, however many ranks wrote them. WorkError where the checkpoint
    belongs to another model.
    """
    try:
        with PieceFiles(checkpoint.files("model")) as files:
            for name, piece in model_pieces(model).items():
                if not files.fill(name, piece):
                    raise WorkError(f"{checkpoint.folder} has no {name} {list(piece.shape)}: it is of another model")
        with PieceFiles(checkpoint.files("optimizer")) as files:
            for name, parameter in model.named_parameters():
                optimizer.state[parameter] = dict(_remembered(files, name, parameter))
    except SafetensorError as error:
        raise WorkError(
            f"{checkpoint.folder} cannot be read ({error}); delete it to go on from the one before"
        ) from None


def _remembered(files: PieceFiles, name: str, parameter: torch.nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the optimizer's state of one parameter: tensors with its rows, sharded like the parameter, and numbers."""
    for path, shape in files.shapes.items():
        key, _, of = path.partition("/")
        if of == name and shape and shape[0] == parameter.shape[0]:
            moment = rows_like(parameter, shape, files.dtypes[path])
            files.fill(path, piece_of(moment))
            yield key, moment
        elif of == name:
            yield key, files.whole(path).to(parameter.device)
