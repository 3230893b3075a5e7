"""Scores every axis of the teacher in one pass over the calibration samples.

Samples go through in blocks; in a block the graph runs layer by layer for all its batches (`execute`), so that memory is
one layer's weights and the block's residual stream. After every block what was accumulated is saved: a killed calibration
goes on with the next block. All axes are scored, whatever the spec narrows, so that the scores serve other specs too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minitron.compiler.graph.executor import Executor
from minitron.compiler.importance.batches import batches_of
from minitron.compiler.importance.layer_removal import removal_scores
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.taps import CalibrationConfig, Taps
from minitron.compiler.importance.tensor_file import read_tensors, write_tensors
from minitron.compiler.roles.analysed import AnalysedTeacher
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
    batches, block = batches_of(samples, teacher.roles.hidden.size, one_at_a_time=taps.one_at_a_time)
    taps.elimination.batches = min(block, len(batches))
    done = _restore(taps, saved)
    with progress.task("calibrate", len(batches) * executor.segments, "batches", done * executor.segments) as task:
        while done < len(batches):
            part = batches[done : done + block]
            taps.begin(part)
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
    write_tensors(saved.path, saved.key, state, done=str(done))


def _restore(taps: Taps, saved: Interrupted) -> int:
    """The number of batches that an earlier process has accumulated; what a damaged file held is computed again."""
    found = read_tensors(saved.path, saved.key)
    if found is None:
        return 0
    tensors, metadata = found
    taps.restore(tensors)
    return int(metadata["done"])
