"""Scores every axis of the teacher in one pass over the calibration samples.

Samples go through in blocks; in a block the graph runs layer by layer for all its batches (`execute`), so that memory is
one layer's weights and the block's residual stream. After every block what was accumulated is saved: a killed calibration
goes on with the next block. All axes are scored, whatever the spec narrows, so that the scores serve other specs too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minitron.compiler.graph.executor import Executor
from minitron.compiler.importance.batches import batches_of
from minitron.compiler.importance.layer_removal import removal_scores
from minitron.compiler.importance.scores import (
    ScoreTable,
)
from minitron.compiler.importance.taps import CalibrationConfig, Taps
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.specs.atomic import atomic_path
from minitron.specs.progress import Progress


@dataclass(frozen=True)
class Interrupted:
    """The file that keeps what a calibration has accumulated so far; `key` identifies the calibration that may go on."""

    path: Path
    key: str


def calibrate(
    teacher: AnalysedTeacher,
    executor: Executor,
    samples: torch.Tensor,
    config: CalibrationConfig,
    *,
    need_layers: bool,
    saved: Interrupted,
    progress: Progress,
) -> ScoreTable:
    """Scores of all axes over `samples` [samples, sequence]. `need_layers`: also where that takes removing each layer."""
    taps = Taps(teacher, config, executor.fetch)
    batches, block = batches_of(samples, teacher.roles.hidden.size)
    taps.elimination.batches = min(block, len(batches))
    done = _restore(taps, saved)
    with progress.task("calibrate", len(batches) * executor.segments, "batches", done * executor.segments) as task:
        while done < len(batches):
            part = batches[done : done + block]
            executor.run(part, taps=taps.taps(), advance=lambda _: task.advance(1))
            done += len(part)
            if done < len(batches):
                _save(taps.state(), saved, done)
    scores = taps.table()
    if need_layers and config.depth.metric != "block_influence":
        layers = removal_scores(teacher, executor, batches, block, config.depth.metric, progress)
        scores = replace(scores, layers=layers)
    saved.path.unlink(missing_ok=True)
    return scores


def _save(state: dict[str, torch.Tensor], saved: Interrupted, done: int) -> None:
    from safetensors.torch import save_file

    with atomic_path(saved.path) as temporary:
        save_file(state, temporary, metadata={"key": saved.key, "done": json.dumps(done)})


def _restore(taps: Taps, saved: Interrupted) -> int:
    """The number of batches that an earlier process has accumulated."""
    from safetensors import SafetensorError, safe_open

    if not saved.path.is_file():
        return 0
    try:
        with safe_open(saved.path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("key") != saved.key:
                return 0
            taps.restore({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
            return int(json.loads(metadata["done"]))
    except SafetensorError:  # a damaged file: what it held is computed again
        return 0
