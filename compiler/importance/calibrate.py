"""Scores every axis of the teacher in one pass over the calibration samples.

Samples go through in blocks; in a block the graph runs layer by layer for all its batches (`execute`), so that memory is
one layer's weights and the block's residual stream. After every block what was accumulated is saved: a killed calibration
goes on with the next block. All axes are scored, whatever the spec narrows, so that the scores serve other specs too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.executor import Executor
from minitron.compiler.importance.batches import batches_of
from minitron.compiler.importance.layer_removal import removal_scores
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.taps import CalibrationConfig, Taps
from minitron.compiler.roles.residual_stream import LayerEnds
from minitron.compiler.roles.roles import Roles
from minitron.specs.atomic import atomic_path
from minitron.specs.progress import Progress


def calibrate(
    captured: Captured,
    table: AxisTable,
    roles: Roles,
    ends: Sequence[LayerEnds],
    executor: Executor,
    samples: torch.Tensor,
    config: CalibrationConfig,
    *,
    need_layers: bool,
    partial: Path,
    key: str,
    progress: Progress,
) -> ScoreTable:
    """Scores of all axes. `partial` keeps what was accumulated so far, for the calibration that `key` identifies."""
    taps = Taps(captured, table, roles, ends, config)
    batches, block = batches_of(samples, roles.hidden.size)
    done = _restore(taps, partial, key)
    with progress.task("calibrate", len(batches) * executor.segments, "batches", done * executor.segments) as task:
        while done < len(batches):
            part = batches[done : done + block]
            executor.run(part, taps=taps.taps(), advance=lambda _: task.advance(1))
            done += len(part)
            if done < len(batches):
                _save(taps.state(), partial, key, done)
    scores = taps.table()
    if need_layers and config.depth.metric != "block_influence":
        layers = removal_scores(captured, ends, executor, batches, block, config.depth.metric, progress)
        scores = replace(scores, layers=layers)
    partial.unlink(missing_ok=True)
    return scores


def _save(state: dict[str, torch.Tensor], path: Path, key: str, done: int) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"key": key, "done": json.dumps(done)})


def _restore(taps: Taps, path: Path, key: str) -> int:
    """The number of batches that an earlier process has accumulated."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("key") != key:
                return 0
            taps.restore({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
            return int(json.loads(metadata["done"]))
    except SafetensorError:  # a damaged file: what it held is computed again
        return 0
