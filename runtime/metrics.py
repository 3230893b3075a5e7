"""The metrics of every step: train/metrics.jsonl, and the trackers that the plan names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from minitron.runtime.disk import writing
from minitron.runtime.trackers import Trackers, TrackerSettings
from minitron.specs.atomic import atomic_path
from minitron.specs.builds import METRICS
from minitron.specs.json_files import json_lines
from minitron.specs.progress import Progress


class MetricsLog:
    """Appends one JSON object a step. Opened at a step, the log first removes all later lines, so that each step stands
    in the file once, however often training was killed; a last line that was cut short is removed too.
    """

    def __init__(self, folder: Path, step: int, progress: Progress, trackers: TrackerSettings | None = None) -> None:
        path = folder / METRICS
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as kept:
            kept.writelines(json.dumps(line) + "\n" for line in iter_metrics(path) if line["step"] <= step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = Trackers(trackers or TrackerSettings(), folder, step, progress)

    def write(self, figures: Mapping[str, float]) -> None:
        """Writes one line: `figures` has the key `step`."""
        with writing(self._file.name):
            self._file.write(json.dumps(dict(figures)) + "\n")
            self._file.flush()
        shown = {name: value for name, value in figures.items() if name != "step"}
        self._trackers.write(int(figures["step"]), shown)

    def sync(self) -> None:
        """Flushes the log to disk before a checkpoint of the same step exists: else a power cut could leave a step
        without its line.
        """
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._trackers.close()


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the steps of a metrics.jsonl one after the other; none where there is no such file."""
    return (line for line in json_lines(path) if isinstance(line.get("step"), int))


def last_held_out_loss(path: Path) -> float | None:
    """Returns the held-out loss that a training measured last; None where it measured none."""
    loss = None
    for line in iter_metrics(path):
        loss = line.get("held_out_loss", loss)
    return loss
