"""The trackers that training reports to beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A tracker is a convenience: what goes wrong with one during training is said once, and training goes on. A training that is
resumed goes on in the same run: the run's id lies in the work folder.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from minitron.specs.atomic import write_text
from minitron.specs.builds import METRICS, TENSORBOARD, TRACKERS
from minitron.specs.errors import UsageError, first_line
from minitron.specs.progress import Progress
from minitron.specs.tracking import TITLES, TrackerName, installed

_PROJECT = "minitron"
"""The project of Weights & Biases and the experiment of MLflow; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME name others."""


@dataclass(frozen=True)
class TrackerSettings:
    """The trackers of a training: None stands for TensorBoard where it is installed. `values` are shown with the run."""

    track: Sequence[TrackerName] | None = None
    name: str = "training"
    values: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """A place that figures are written to, step by step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The open trackers of a training."""

    def __init__(self, settings: TrackerSettings, folder: Path, step: int, progress: Progress) -> None:
        """Opens the trackers in the work folder of a training that goes on after `step`. UsageError where one does not
        start.
        """
        self._open: dict[TrackerName, Tracker] = {}
        self._progress = progress
        wanted: Sequence[TrackerName] = settings.track or ()
        if settings.track is None:
            wanted = ("tensorboard",) if installed("tensorboard") else ()
            if not wanted:
                progress.message(f"{METRICS} only: TensorBoard is not installed (pip install 'minitron[tensorboard]')")
        for name in dict.fromkeys(wanted):
            try:
                self._open[name] = _MAKE[name](settings, folder, step)
            except Exception as error:  # network, keys, disk: each library has its own kinds
                self.close()
                raise UsageError(
                    f"{TITLES[name]} did not start ({first_line(error)}); {_REMEDIES[name]}, or leave `{name}` out of `track`"
                ) from None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step to each tracker that works."""
        for name in list(self._open):
            self._each(name, lambda tracker: tracker.write(step, figures))

    def close(self) -> None:
        """Closes all of them."""
        for name in list(self._open):
            self._each(name, lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, name: TrackerName, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._open[name])
        except Exception as error:
            del self._open[name]
            self._progress.message(
                f"{TITLES[name]} has failed ({first_line(error)}) and gets no more figures; training goes on, and {METRICS} "
                "has all of them"
            )


class _TensorBoard:
    def __init__(self, settings: TrackerSettings, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, settings: TrackerSettings, folder: Path, step: int) -> None:
        import wandb

        identifier = _run_id(folder, "wandb", lambda: uuid.uuid4().hex[:12])
        # What the command prints is its own: no capture, no banner.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT), name=settings.name, id=identifier, resume="allow",
            dir=str(folder), config=dict(settings.values), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """Metrics go to MLFLOW_TRACKING_URI, or to files in the work folder where that is not set."""

    def __init__(self, settings: TrackerSettings, folder: Path, step: int) -> None:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # of MLflow 3, which prefers databases
            address = (folder / "mlruns").absolute().as_uri()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=address)
        self._id = _run_id(folder, "mlflow", lambda: self._begin(settings))
        self._client.update_run(self._id, status="RUNNING")

    def _begin(self, settings: TrackerSettings) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        there = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if there is None else there.experiment_id
        identifier: str = self._client.create_run(experiment, run_name=settings.name).info.run_id
        for key, value in settings.values.items():
            self._client.log_param(identifier, key, value)
        return identifier

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, float(value), now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


_MAKE: Mapping[TrackerName, Callable[[TrackerSettings, Path, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
_REMEDIES: Mapping[TrackerName, str] = {
    "tensorboard": "install it again: pip install 'minitron[tensorboard]'",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "see that MLFLOW_TRACKING_URI can be reached, or unset it",
}


def _run_id(folder: Path, name: str, begin: Callable[[], str]) -> str:
    """Returns the id of this training's run in a tracker: the one that an earlier start has noted, or that of a new run."""
    path = folder / TRACKERS
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    if not isinstance(known.get(name), str):
        known[name] = begin()
        write_text(path, json.dumps(known) + "\n")
    return str(known[name])
