"""Machines in trouble: signals, ranks that are killed or alone, variables left over, readers that went away."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.cli.main import command_line
from minitron.compiler.emit.program import run_program
from minitron.runtime import train
from minitron.runtime.metrics import MetricsLog, last_held_out_loss
from minitron.specs.errors import UsageError
from minitron.specs.progress import Silent
from tests.foundry import Foundry
from tests.runtime import processes, tiny
from tests.runtime.processes import CONTEXT, last_word, start, train_in_process, train_on_ranks

ROOT = Path(__file__).resolve().parents[2]
LONG = {"tokens": 64 * 10_000, "checkpoint": {"every_tokens": 64 * 8_000, "keep_last": 2}, "held_out": None}
SHORT = {"tokens": 64, "checkpoint": {"every_tokens": 64, "keep_last": 1}, "held_out": None}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_whatever_ends_a_training_it_saves_first(build: Path, number: signal.Signals) -> None:
    """SIGHUP: the terminal was closed. SIGUSR1: what Slurm sends before the time is over."""
    tiny.write_plan(build, **LONG)
    process, pipe = start(build)
    assert pipe.recv() == "step" and process.pid is not None
    os.kill(process.pid, number)
    assert last_word(process, pipe) == "interrupted"
    assert len(list((build / "train" / "checkpoints").glob("step-*"))) == 1


# --- variables of torchrun ---

ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"WORLD_SIZE": "abc"},
            "WORLD_SIZE is `abc` in the environment, and a whole number is wanted; start with torchrun",
        ),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ``"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is `0`"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is `-2`"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is `²`"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set without RANK and MASTER_ADDR"),
        (ALONE | {"LOCAL_RANK": "first"}, "LOCAL_RANK is `first`"),
        (ALONE | {"RANK": "one"}, "RANK is `one`"),
        (ALONE | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2; ranks are counted from 0: start with torchrun"),
        (ALONE | {"MASTER_PORT": "http"}, "MASTER_PORT is `http`"),
    ],
)
def test_variables_that_make_no_sense(
    build: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        train(build, device="cpu", progress=Silent())


def test_a_rank_left_over_in_the_environment(
    build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process alone tells its results, whatever an earlier torchrun left behind."""
    tiny.write_plan(build, **SHORT)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command_line(["train", str(build), "--device", "cpu"]) == 0
    assert "Training" in capsys.readouterr().out


# --- ranks ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_the_others_can_be_ended(build: Path, number: signal.Signals) -> None:
    port = free_port()
    ours, theirs = CONTEXT.Pipe()
    arguments = (0, 2, port, build, theirs, processes._train, None)
    process = CONTEXT.Process(target=processes._rank, args=arguments, daemon=True)
    process.start()
    theirs.close()
    deadline = time.monotonic() + 60
    while not listens(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert ours.poll(20), "it waits for the other process and hears nothing"
    assert last_word(process, ours) == "interrupted"


def test_a_killed_rank_is_one_sentence(build: Path) -> None:
    tiny.write_plan(build, **LONG)
    first, second = train_on_ranks(build, 2, processes.kill_at_third_step, on=[1])
    assert second is None
    assert first is not None and first.startswith(
        "OtherProcessEnded: another process of this training has ended, killed"
    )
    assert "\n" not in first and first.endswith("it goes on from the last checkpoint")


# --- readers that went away ---


def test_a_training_whose_output_nobody_reads_goes_on(build: Path) -> None:
    tiny.write_plan(build, **SHORT)
    command = [sys.executable, "-m", "minitron.cli", "train", str(build), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    assert (build / "model" / "model.safetensors").is_file()
    assert train_in_process(build) == "done"


@pytest.mark.parametrize(
    ("redirected", "code", "words"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "error: the output could not be written (No space left on device); the work itself is done"),
        ("nowhere.yaml 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path: Path, redirected: str, code: int, words: str) -> None:
    (tmp_path / "spec.yaml").write_text("teacher: {model: a/b}\nstudent: {layers: {drop: [1]}}\n")
    command = f"{sys.executable} -m minitron.cli validate spec.yaml {redirected}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (code, words)


def test_metrics_of_a_long_training_take_no_memory(tmp_path: Path) -> None:
    line = {"step": 0, "loss": 1.25, "tokens": 1, "note": "x" * 200}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line | {"step": step, "held_out_loss": step / 7}) + "\n" for step in range(40_000))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    (tmp_path / "other").mkdir()
    with MetricsLog(tmp_path / "other", 0, Silent()):
        pass  # what it imports on its first use is not what is measured
    tracemalloc.start()
    try:
        with MetricsLog(tmp_path, 39_998, Silent()) as log:
            log.write({"step": 39_999, "loss": 1.0})
        assert last_held_out_loss(tmp_path / "metrics.jsonl") == 39_998 / 7
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 10 << 20 and peak < 2 << 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40_000


# --- whose code runs ---


def test_a_module_in_the_current_folder_is_not_run(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = foundry.build(foundry.teacher("llama"), {"intermediate_size": 24})
    (tmp_path / "safetensors.py").write_text("raise SystemExit('this file was executed')\n")
    monkeypatch.chdir(tmp_path)
    ids: Any = torch.arange(6).reshape(1, 6)
    weights = sorted((build.folder / "student").glob("*.safetensors"))
    assert run_program(build.folder / "student.pt2", weights, ids).shape[:2] == (1, 6)
