"""The programs that training reports to beside its own metrics, and what each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from minitron.specs.errors import Problem

TrackerName: TypeAlias = Literal["tensorboard", "wandb", "mlflow"]

TITLES: dict[TrackerName, str] = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}


def installed(name: TrackerName) -> bool:
    """Checks whether the module of a tracker, which has the tracker's name, is installed."""
    return importlib.util.find_spec(name) is not None


def missing_trackers(names: Sequence[TrackerName], at: str) -> Iterator[Problem]:
    """Yields a problem for each tracker under the key `at` that is not installed here."""
    for index, name in enumerate(names):
        if not installed(name):
            hint = f"pip install 'minitron[{name}]' where the student is trained, or leave `{name}` out"
            yield Problem(f"{at}.{index}", f"{TITLES[name]} is not installed here", hint)
