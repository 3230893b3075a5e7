"""Trackers beside metrics.jsonl: what they are given, that a resumed training goes on in the same run, and that none of
them can end a training. Offline: the files of Weights & Biases and of MLflow, whose tests are skipped where they are not
installed; `make install` leaves both out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.cli.main import command_line
from minitron.runtime import trackers, train
from minitron.runtime.metrics import MetricsLog
from minitron.runtime.trackers import TrackerSettings
from minitron.specs import tracking
from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.listening import AtStep, Messages


def interrupted_and_resumed(build: Path, *names: str) -> list[dict[str, Any]]:
    """Trains, stopped after the fifth step and gone on with."""
    tiny.write_plan(build, track=list(names))

    def stop() -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(build, device="cpu", progress=AtStep(5, stop))
    train(build, device="cpu", progress=Silent())
    return tiny.read_metrics(build / "train" / "metrics.jsonl")


def test_mlflow_has_one_run_with_every_step(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed (pip install 'minitron[mlflow]')")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = interrupted_and_resumed(build, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(build / "train" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("minitron").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optimizer.lr"] == "0.003"
    assert run.info.run_name.startswith("tiny")
    history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss")}
    assert history == {line["step"]: line["loss"] for line in lines}


def test_wandb_writes_offline_and_goes_on_in_the_same_run(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'minitron[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_and_resumed(build, "wandb")
    identifier = json.loads((build / "train" / "trackers.json").read_text())["wandb"]
    files = sorted((build / "train" / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
    assert files and all(path.stat().st_size > 0 for path in files)
    assert b"loss" in files[-1].read_bytes() and b"optimizer.lr" in files[0].read_bytes()


def test_an_address_that_cannot_be_reached_is_said_before_the_first_step(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed (pip install 'minitron[mlflow]')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    tiny.write_plan(build, track=["mlflow"])
    with pytest.raises(UsageError, match=r"MLflow did not start \(.*\); see that MLFLOW_TRACKING_URI can be reached"):
        train(build, device="cpu", progress=Silent())


class Broken:
    """A tracker whose disk is full from its second step on."""

    def __init__(self, settings: TrackerSettings, folder: Path, step: int) -> None:
        self.seen: list[int] = []

    def write(self, step: int, figures: Any) -> None:
        self.seen.append(step)
        if len(self.seen) == 2:
            raise OSError("no space left")

    def close(self) -> None:
        raise AssertionError("it has been given up")


def test_a_tracker_that_fails_does_not_end_the_training(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MAKE", {"tensorboard": Broken})
    tiny.write_plan(build, track=["tensorboard"])
    progress = Messages()
    train(build, device="cpu", progress=progress)
    said = [text for text in progress.texts if "TensorBoard" in text]
    assert said == [
        "TensorBoard has failed (no space left) and gets no more figures; training goes on, and metrics.jsonl has all of them"
    ]
    assert len(tiny.read_metrics(build / "train" / "metrics.jsonl")) == 12


def test_none_is_a_choice(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, Silent(), TrackerSettings(())) as log:
        log.write({"step": 1, "loss": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- what is not installed ---

SPEC = """\
teacher: {model: org/model}
student: {layers: {drop: [1]}}
distill:
  data: {text: [a.txt]}
  tokens: 1M
  track: [tensorboard, wandb]
"""


def test_a_tracker_that_is_not_installed_is_said_early(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "installed", lambda name: name != "wandb")
    (tmp_path / "spec.yaml").write_text(SPEC)
    assert command_line(["validate", str(tmp_path / "spec.yaml")]) == 0
    assert (
        "spec.yaml:6:24: distill.track.1: Weights & Biases is not installed here; pip install 'minitron[wandb]' where the "
        "student is trained, or leave `wandb` out" in capsys.readouterr().err
    )
    tiny.write_plan(build, track=["wandb"])
    with pytest.raises(SpecInvalid, match=r"training.yaml:\d+:3: track.0: Weights & Biases is not installed here"):
        train(build, device="cpu", progress=Silent())
    assert not (build / "train" / "metrics.jsonl").exists()
