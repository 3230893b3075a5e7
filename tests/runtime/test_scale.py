"""However many ranks train, and however the weights lie on them, the student learns the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron.runtime import train
from minitron.runtime.gradients import sum_gradients
from minitron.runtime.world import World
from minitron.specs.progress import Silent
from tests.runtime import processes, tiny
from tests.runtime.processes import train_on_ranks
from tests.runtime.tiny import read_metrics

STEPS = 24
PLAN: dict[str, Any] = {
    "tokens": 16 * 4 * STEPS,
    "micro_batch_size": 1,
    "held_out__max_tokens": 290,
    "checkpoint": {"every_tokens": 16 * 4 * 8},
}
SAME = 1e-5  # relative; sums in another order differ in the last digits of fp32


def curve(build: Path) -> list[float]:
    """Loss, gradient norm and held-out loss of every step."""
    lines = read_metrics(build / "train" / "metrics.jsonl")
    return [line[key] for line in lines for key in ("loss", "grad_norm", "held_out_loss") if key in line]


def weights(build: Path) -> bytes:
    return (build / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same build, trained by 1, 2 and 4 ranks."""
    root = tmp_path_factory.mktemp("scale")
    # Held-out text of an odd number of windows: the ranks have unequally many.
    tiny.make_build(root / "0", **PLAN)
    builds = {}
    for size in (1, 2, 4):
        shutil.copytree(root / "0", root / str(size))
        builds[size] = root / str(size) / "build"
        assert train_on_ranks(builds[size], size) == ["done"] * size
    return builds


@pytest.fixture
def build(trained: dict[int, Path], tmp_path: Path) -> Path:
    """The build of `trained`, untrained."""
    shutil.copytree(trained[1].parent.parent / "0", tmp_path / "here")
    return tmp_path / "here" / "build"


@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_learn_the_same(trained: dict[int, Path], size: int) -> None:
    assert curve(trained[size]) == pytest.approx(curve(trained[1]), rel=SAME)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_model_is_one_checkpoint_however_many_ranks(trained: dict[int, Path], size: int) -> None:
    here, alone = trained[size] / "model", trained[1] / "model"
    assert sorted(file.name for file in here.iterdir()) == sorted(file.name for file in alone.iterdir())
    assert (here / "config.json").read_text() == (alone / "config.json").read_text()
    ours, theirs = load_file(here / "model.safetensors"), load_file(alone / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-5) for name, tensor in ours.items())
    assert AutoModelForCausalLM.from_pretrained(here).config.architectures == ["LlamaForCausalLM"]


def test_each_rank_writes_only_what_it_holds(trained: dict[int, Path]) -> None:
    sizes = {
        size: [path.stat().st_size for path in trained[size].glob("train/checkpoints/step-00000024/*.safetensors")]
        for size in (1, 2, 4)
    }
    assert {size: len(files) for size, files in sizes.items()} == {1: 2, 2: 4, 4: 8}
    assert all(max(files) < 1.5 * max(sizes[1]) / size for size, files in sizes.items())


def test_a_checkpoint_knows_the_held_out_loss_that_was_measured_with_it(trained: dict[int, Path]) -> None:
    checkpoints = trained[2] / "train" / "checkpoints"
    known = {
        folder.name: json.loads((folder / "state.json").read_text())["held_out_loss"]
        for folder in checkpoints.iterdir()
    }
    last = read_metrics(trained[2] / "train" / "metrics.jsonl")[-1]["held_out_loss"]
    assert known == {"step-00000016": None, "step-00000024": last}


def test_killed_while_two_ranks_save_and_gone_on_bit_for_bit(trained: dict[int, Path], build: Path) -> None:
    assert "done" not in train_on_ranks(build, 2, processes.kill_during_second_checkpoint)
    checkpoints = build / "train" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".minitron-step-00000016.tmp", "step-00000008"]
    assert train_on_ranks(build, 2) == ["done", "done"]
    assert curve(build) == curve(trained[2]) and weights(build) == weights(trained[2])


def test_a_full_disk_on_one_rank_stops_all(trained: dict[int, Path], build: Path) -> None:
    first, second = train_on_ranks(build, 2, processes.full_disk_at_second_checkpoint, on=[1])
    assert first == "WorkError: another process could not write its part of the checkpoint of step 16"
    assert second is not None and "the disk is full; the last good one, " in second and "step-00000008" in second
    assert train_on_ranks(build, 4) == ["done"] * 4
    assert curve(build) == pytest.approx(curve(trained[1]), rel=SAME)


def test_a_full_disk_of_the_first_rank_stops_all_with_one_reason(trained: dict[int, Path], build: Path) -> None:
    first, second = train_on_ranks(build, 2, processes.full_disk_for_metrics)
    assert first == second and "WorkError: metrics.jsonl could not be written: the disk is full" in str(first)
    assert [path.name for path in (build / "train" / "checkpoints").iterdir()] == ["step-00000008"]
    assert train_on_ranks(build, 2) == ["done"] * 2
    assert curve(build) == curve(trained[2])


def test_a_loss_that_is_no_number_stops_all_and_each_keeps_its_batch(build: Path) -> None:
    file = build / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][5] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    tiny.verify(build)
    output, _ = (process := torchrun(build, 2)).communicate(timeout=120)
    saved = build / "train" / "not-finite-step-1-rank-*.safetensors"
    said = f"error: the loss is nan at step 1: no checkpoint was written yet and the batch was saved as {saved}"
    assert process.returncode == 1 and output.count(said) == 1, output
    assert [load_file(part)["input_ids"].shape for part in saved.parent.glob(saved.name)] == [(2, 16)] * 2


def test_one_rank_reads_the_data_for_all(build: Path) -> None:
    assert train_on_ranks(build, 2, processes.without_data, on=[1]) == ["done", "done"]


def test_data_that_is_not_there_is_missed_by_all(build: Path) -> None:
    tiny.write_plan(build, **PLAN, data={"text": ["../gone.txt"]})
    first, second = train_on_ranks(build, 2)
    assert first == second and "data.text.0: there is no file `../gone.txt`" in str(first)


def test_an_expert_that_one_rank_does_not_use() -> None:
    """Its gradient there is 0 and not none: else the ranks would sum different things."""
    used, unused, nowhere = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad = torch.ones(2)

    class Two(World):
        def any_of(self, *flags: bool) -> tuple[bool, ...]:
            return (flags[0], True, flags[2])

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return value.mul_(2)

    sum_gradients([used, unused, nowhere], Two(0, 2, torch.device("cpu")))
    assert unused.grad is not None and unused.grad.tolist() == [0, 0] and nowhere.grad is None
    assert used.grad.tolist() == [2, 2]


LAYOUTS: dict[str, dict[str, Any]] = {
    "replicated": {"layout__student": "replicated"},
    "everything spread and recomputed": {"layout__teacher": "sharded", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tied_weights_a_softcap_a_projection_and_rows_that_do_not_divide(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    head = tiny.HEAD | {"softcap": 3.0}
    common: dict[str, Any] = {
        "student__head": head,
        "teacher__head": head,
        "loss__hidden_states": {"weight": "dynamic"},  # with a projection, which is whole on every rank
        "global_batch_size": 6,
        "tokens": 16 * 6 * 4,
    }
    tiny.make_build(tmp_path / "one", tiny.gemma2(24), tiny.gemma2(16), **common)
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    train(tmp_path / "one" / "build", device="cpu", progress=Silent())
    tiny.write_plan(tmp_path / "three" / "build", **common, **changes)
    assert train_on_ranks(tmp_path / "three" / "build", 3) == ["done"] * 3
    assert curve(tmp_path / "three" / "build") == pytest.approx(curve(tmp_path / "one" / "build"), rel=SAME)
    assert "lm_head.weight" not in load_file(tmp_path / "three" / "build" / "model" / "model.safetensors")


def test_weights_that_rest_in_host_memory(trained: dict[int, Path], build: Path) -> None:
    tiny.write_plan(build, **PLAN, layout__cpu_offload=True)
    train(build, device="cpu", progress=Silent())
    assert curve(build) == pytest.approx(curve(trained[1]), rel=SAME)


def torchrun(build: Path, size: int) -> subprocess.Popen[str]:
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m", "minitron.cli"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, "train", str(build), "--device", "cpu", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip


def test_terminated_under_torchrun_and_gone_on_with_other_numbers(trained: dict[int, Path], build: Path) -> None:
    """2 ranks, SIGTERM in the middle, 4 ranks, Ctrl-C, which reaches torchrun and each of them, and 1 that ends it."""
    metrics, checkpoints = build / "train" / "metrics.jsonl", build / "train" / "checkpoints"
    tiny.write_plan(build, **PLAN | {"checkpoint": {"every_tokens": 10**9}})
    for size in (2, 4):
        before = len(read_metrics(metrics))
        process = torchrun(build, size)
        while len(read_metrics(metrics)) <= before and process.poll() is None:
            time.sleep(0.01)
        if size == 2:
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        done = len(read_metrics(metrics))
        assert before < done < STEPS, output
        assert f"interrupted after step {done}" in output
        assert output.count("interrupted; the same command, started again, goes on where it was") == 1, output
        assert (checkpoints / f"step-{done:08d}").is_dir()
    output, _ = (process := torchrun(build, 1)).communicate(timeout=120)
    assert process.returncode == 0 and f"going on from step {done} of {STEPS}" in output
    assert curve(build) == pytest.approx(curve(trained[1]), rel=SAME)
