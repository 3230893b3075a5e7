"""One process for each device: real processes that the command starts itself, on the CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron.cli.processes import process_count, sharing
from minitron.runtime import train
from minitron.specs.errors import UsageError
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.conftest import build, one_thread, tiny_build

__all__ = ["build", "one_thread", "tiny_build"]

ROOT = Path(__file__).parents[2]
STEPS = 160
SETTINGS = {
    "tokens": 64 * STEPS,
    "checkpoint": {"every_tokens": 64 * 20, "keep_last": 2},
    "held_out": None,
}


def started(build: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minitron.cli", "train", str(build), "--device", "cpu", "--devices", "2", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def steps(build: Path) -> int:
    return len(list(tiny.iter_metrics(build / "train" / "metrics.jsonl")))


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def our_lines(text: str) -> list[str]:
    """What the commands say, without the lines that gloo writes."""
    return [line for line in text.splitlines() if "gloo" not in line.lower() and "rank" not in line]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_interrupted_and_left_alone_it_ends_as_one_process_does(build: Path, tmp_path: Path) -> None:
    tiny.write_plan(build, **SETTINGS)
    shutil.copytree(build.parent, tmp_path / "one")
    train(tmp_path / "one" / "build", device="cpu", progress=Silent())

    first = started(build)
    wait(lambda: steps(build) >= 25)
    pids = children(first)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 1, err
    said = [line for line in our_lines(err) if "process" in line]
    assert [line.partition("; ")[0] for line in said] == [
        "error: process 1 of 2 (counted from 0) was killed by SIGKILL, as the system does where memory runs out"
    ], err
    assert "Traceback" not in err and out == ""

    second = started(build)
    before = steps(build)
    wait(lambda: steps(build) > before + 10)
    second.send_signal(signal.SIGTERM)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 130, err
    assert err.count("the same command, started again, goes on where it was") == 1 and "Traceback" not in err
    newest = max((build / "train" / "checkpoints").glob("step-*"))
    assert int(newest.name[5:]) == steps(build), "saved where it was interrupted"

    third = started(build)
    before = steps(build)
    wait(lambda: steps(build) > before + 10)
    pids = children(third)
    third.kill()
    third.communicate(timeout=120)
    wait(lambda: not any(map(alive, pids)))
    newest = max((build / "train" / "checkpoints").glob("step-*"))
    assert int(newest.name[5:]) == steps(build) < STEPS, "nobody goes on without the command that started it"

    last = started(build)
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert out.count("Training") == 1 and out.count("distilled student") == 1, out
    alone, spread = (
        [line["loss"] for line in tiny.read_metrics(folder / "train" / "metrics.jsonl")]
        for folder in (tmp_path / "one" / "build", build)
    )
    assert len(alone) == STEPS and spread == pytest.approx(alone, rel=1e-4)


def test_a_mistake_is_told_once(build: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "minitron.cli", "train", str(build), "--device", "cpu", "--devices", "3"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.count("4 sequences cannot be shared equally by 3 processes") == 1


def test_torchrun_restarts_a_training_that_lost_a_process(build: Path, tmp_path: Path) -> None:
    tiny.write_plan(build, tokens=64 * 8, checkpoint={"every_tokens": 64, "keep_last": 2}, held_out=None)
    shutil.copytree(build.parent, tmp_path / "one")
    train(tmp_path / "one" / "build", device="cpu", progress=Silent())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *launcher,
        "--max-restarts",
        "1",
        "-m",
        "tests.runtime.dies_once",
        "train",
        str(build),
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "going on from step " in process.stderr
    alone, spread = (
        [line["loss"] for line in tiny.read_metrics(folder / "train" / "metrics.jsonl")]
        for folder in (tmp_path / "one" / "build", build)
    )
    assert spread == pytest.approx(alone, rel=1e-5)


# --- how many ---


def test_one_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert process_count(None, "cuda", None) == process_count("all", "cuda", "cuda") == 4
    assert process_count("2", "cuda", None) == 2
    assert process_count("none", "cuda", None) == process_count(None, "cuda", "cuda:1") == 1
    assert process_count(None, "cpu", None) == process_count("all", "cpu", "cpu") == 1
    assert process_count("3", "cpu", "cpu") == 3
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_count(None, "cuda", None) == process_count("none", "cuda", None) == 1


@pytest.mark.parametrize(
    ("devices", "named", "message"),
    [
        ("8", None, "--devices 8: this machine has 4 CUDA devices; write at most 4"),
        ("0", None, "--devices 0: not a number of devices; write a number, all or none"),
        ("two", None, "--devices two: not a number of devices"),
        ("2", "cuda:1", "--devices 2: --device cuda:1 is one device; write --device cuda"),
    ],
)
def test_numbers_that_are_not_possible(
    monkeypatch: pytest.MonkeyPatch, devices: str, named: str | None, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UsageError, match=message):
        process_count(devices, "cuda", named)


def test_under_torchrun_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--devices 2: torchrun has started this process already; leave it out"):
        process_count("2", "cpu", None)


def test_as_many_devices_as_can_share_the_batch(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sharing(build, 3, None) == 2 and sharing(build, 4, "all") == 4
    assert "2 of 3 devices: 4 sequences of a global batch cannot be shared equally by more" in capsys.readouterr().err
    assert sharing(build, 3, "3") == 3, "what the user wrote is refused by the training, with what would do"


def test_several_machines_need_a_store_for_each_attempt(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
        "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="need `export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` on each of them"):
        train(build, device="cpu", progress=Silent())
