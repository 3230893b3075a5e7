"""What is written down at every step: train/metrics.jsonl, and TensorBoard events where TensorBoard is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from minitron.runtime.disk import writing
from minitron.specs.atomic import write_text
from minitron.specs.builds import METRICS, TENSORBOARD
from minitron.specs.progress import Progress


class MetricsLog:
    """Appends one JSON object a step. Opened at a step, it first forgets everything after it, so that each step
    stands in the file once, however often training was killed; a last line that was cut short goes with it."""

    def __init__(self, folder: Path, step: int, progress: Progress) -> None:
        path = folder / METRICS
        kept = [line for line in _whole_lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / TENSORBOARD, step, progress)

    def write(self, figures: Mapping[str, float]) -> None:
        """`figures` has `step`; one line a step."""
        with writing(self._file.name):
            self._file.write(json.dumps(dict(figures)) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in figures.items():
                    if name != "step":
                        self._board.add_scalar(name, value, int(figures["step"]))

    def sync(self) -> None:
        """On the disk before a checkpoint of the same step is: else a power cut could leave a step without its line."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl, whole lines only; empty where there is no such file."""
    return _whole_lines(path)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _tensorboard(folder: Path, step: int, progress: Progress) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        progress.message(f"{METRICS} only: TensorBoard is not installed (pip install 'minitron[tensorboard]')")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
