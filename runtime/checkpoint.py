"""Checkpoints: whole or not at all, checked when read, the newest good one wins.

    train/checkpoints/step-00000120/
        model.safetensors       fp32 master weights and buffers
        optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME
        state.json              step, samples, tokens, what training.yaml said, size and CRC of the two files

There is no state of random generators in it: order and dropout are functions of the seed and the sample index.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron.runtime.disk import explain
from minitron.specs.atomic import atomic_folder, remove_leftovers
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress

_FORMAT = 1
_CHUNK = 1 << 24


@dataclass(frozen=True)
class TrainerState:
    """How far training is. Everything else follows from `samples`."""

    step: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class Checkpoint:
    """One folder, its state, and what the plan said when it was written."""

    folder: Path
    state: TrainerState
    identity: Mapping[str, Any]


class Checkpoints:
    """The checkpoints in `folder`, of which the last `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def names(self) -> list[Path]:
        """All that are there, the newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def save(
        self, state: TrainerState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
    ) -> None:
        """Writes one and removes what is older than the last `keep`.

        WorkError for a full disk or one that cannot be written to; the checkpoints that were there are untouched.
        """
        try:
            with atomic_folder(self.folder / f"step-{state.step:08d}") as temporary:
                save_file(_model_tensors(model), temporary / "model.safetensors")
                save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
                files = {path.name: _measure(path) for path in sorted(temporary.iterdir())}
                document = {"format_version": _FORMAT, **asdict(state), "identity": dict(identity), "files": files}
                (temporary / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise self._not_written(state, error) from None
        for old in self.names()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _not_written(self, state: TrainerState, error: Exception) -> WorkError:
        there = self.names()
        kept = f"the last good one, {there[0]}, was kept" if there else "there is none before it"
        reason, remedy = explain(error)
        return WorkError(
            f"the checkpoint of step {state.step} could not be written to {self.folder}: {reason}; {kept}. "
            f"{remedy[0].upper()}{remedy[1:]} and train again: it goes on from there"
        )

    def newest(self, progress: Progress) -> Checkpoint | None:
        """The newest one whose files are whole; None where there is none at all.

        Damaged ones are put aside with a message, for the next ones to take their places. WorkError where all are
        damaged: a training is not begun anew unasked.
        """
        remove_leftovers(self.folder)
        damaged: dict[Path, Exception] = {}
        for folder in self.names():
            try:
                good = _check(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged[folder] = error
                continue
            for other, reason in damaged.items():
                aside = other.with_name(f"damaged-{other.name}")
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
                progress.message(f"the checkpoint {other.name} is damaged ({reason}); it was put aside as {aside.name}")
            return good
        if damaged:
            raise WorkError(f"every checkpoint in {self.folder} is damaged; delete that folder to begin again")
        return None


def _check(folder: Path) -> Checkpoint:
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if document["format_version"] != _FORMAT:
        raise ValueError(f"its format is {document['format_version']}, this version reads {_FORMAT}")
    for name, measured in document["files"].items():
        if _measure(folder / name) != measured:
            raise ValueError(f"{name} is not what was written")
    state = TrainerState(document["step"], document["samples"], document["tokens"])
    return Checkpoint(folder, state, document["identity"])


def _measure(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def load(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the weights and the optimizer's moments where they were. WorkError where they are another model's."""
    weights, moments = (load_file(checkpoint.folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise WorkError(f"{checkpoint.folder} has no {name} {list(tensor.shape)}: it is of another model")
            tensor.copy_(weights[name])
    for name, parameter in model.named_parameters():
        keys = {key.split("/", 1)[0]: key for key in moments if key.split("/", 1)[1] == name}
        if keys:
            optimizer.state[parameter] = {
                short: moments[key].to(parameter.device, copy=True) for short, key in keys.items()
            }


def _model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each storage once (tied weights under their first name)."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach()
    return tensors


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
