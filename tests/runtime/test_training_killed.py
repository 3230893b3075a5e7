"""A process that is killed at any moment loses nothing: started again, it ends where an undisturbed one ends, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from minitron.runtime.order import mix, shuffled
from tests.runtime import processes, tiny
from tests.runtime.processes import last_word, start, train_in_process, train_on_ranks

STEPS = 24


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("origin")
    tiny.make_build(
        root,
        tokens=64 * STEPS,
        checkpoint={"every_tokens": 64 * 3, "keep_last": 2},
        held_out={"data": {"text": ["../valid.txt"]}, "max_tokens": 200, "every_tokens": 64 * 5},
    )
    return root


@pytest.fixture(scope="module")
def whole(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], bytes]:
    """What an undisturbed training ends with."""
    root = tmp_path_factory.mktemp("whole") / "here"
    shutil.copytree(origin, root)
    assert train_in_process(root / "build") == "done"
    return tiny.result(root / "build")


@pytest.fixture
def build(origin: Path, tmp_path: Path) -> Path:
    shutil.copytree(origin, tmp_path / "here")
    return tmp_path / "here" / "build"


def kill_after(build: Path, steps: int, spin: int) -> bool:
    """SIGKILL after so many reports and a few turns more. Whether it was in time."""
    process, pipe = start(build)
    try:
        for _ in range(steps):
            if pipe.recv() != "step":
                return False
        for _ in range(spin):
            pass
    except EOFError:
        return False
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    last_word(process, pipe)
    return process.exitcode == -signal.SIGKILL


def test_killed_five_times_at_random_points(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    random.seed(int.from_bytes(os.urandom(4)))
    kills = [kill_after(build, random.randrange(1, 7), random.randrange(200_000)) for _ in range(5)]
    assert any(kills)
    assert train_in_process(build) == "done"
    assert tiny.result(build) == whole
    leftovers = [path.name for path in build.rglob("*") if path.name.endswith(".tmp")]
    assert not leftovers


def test_killed_while_a_checkpoint_is_written(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    assert train_in_process(build, processes.kill_during_second_checkpoint) is None
    checkpoints = build / "train" / "checkpoints"
    assert sorted(path.name.endswith(".tmp") for path in checkpoints.iterdir()) == [False, True]
    assert train_in_process(build) == "done"
    assert tiny.result(build) == whole


def test_a_disk_that_fills_up_while_training_goes_on(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    word = str(train_in_process(build, processes.full_disk_at_second_checkpoint))
    assert word.startswith("WorkError: the checkpoint of step 6 could not be written to")
    assert "the disk is full; the last good one, " in word and "step-00000003, was kept. Make room" in word
    assert [path.name for path in (build / "train" / "checkpoints").iterdir()] == ["step-00000003"]
    assert train_in_process(build) == "done"
    assert tiny.result(build) == whole


def test_killed_while_the_model_is_written(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    assert train_in_process(build, processes.kill_before_the_model_is_named) is None
    assert not (build / "model").exists()
    assert train_in_process(build) == "done"
    assert tiny.result(build) == whole
    assert not list(build.glob(".*.tmp"))


def test_terminated_it_saves_first(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    process, pipe = start(build)
    assert pipe.recv() == "step"
    process.terminate()
    assert last_word(process, pipe) == "interrupted"
    assert len(list((build / "train" / "checkpoints").glob("step-*"))) >= 1
    assert train_in_process(build) == "done"
    assert tiny.result(build) == whole


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line[key] for line in lines for key in ("loss", "grad_norm", "held_out_loss") if key in line]


def test_begun_on_one_rank_and_ended_on_two(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    assert kill_after(build, 8, 0)
    assert train_on_ranks(build, 2) == ["done", "done"]
    assert losses(tiny.result(build)[0]) == pytest.approx(losses(whole[0]), rel=1e-5)


def test_a_micro_batch_of_the_whole_batch_is_shared_by_ranks(
    build: Path, whole: tuple[list[dict[str, Any]], bytes]
) -> None:
    """As compile writes it for a small batch: one rank takes all of it at once, two take half of it each."""
    plan = (build / "training.yaml").read_text(encoding="utf-8")
    (build / "training.yaml").write_text(plan.replace("micro_batch_size: 2", "micro_batch_size: 4"), encoding="utf-8")
    assert train_on_ranks(build, 2) == ["done", "done"]
    assert losses(tiny.result(build)[0]) == pytest.approx(losses(whole[0]), rel=1e-5)


def test_a_batch_that_ranks_cannot_share(build: Path) -> None:
    words = train_on_ranks(build, 3)
    assert all(
        "4 sequences cannot be shared equally by 3 processes; write a multiple of 3" in str(word) for word in words
    )


def test_ranks_that_do_not_share_the_build(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    words = train_on_ranks([build, tmp_path / "there" / "build"], 2)
    assert all("train is not the same folder on all machines; put the build on a file system" in str(w) for w in words)
    assert not (build / "train" / "checkpoints").exists()


def test_a_block_that_one_rank_finds_damaged_ends_all_with_its_sentence(build: Path) -> None:
    hook = processes.small_blocks_checked_late
    assert train_in_process(build, hook) == "done"
    shutil.rmtree(build / "train" / "checkpoints")
    (build / "train" / "finished.json").unlink()
    (file,) = (one for one in build.glob("train/data/*/shard-000000.tokens") if one.stat().st_size > 1000)
    content = bytearray(file.read_bytes())
    # Two bytes a token: sample 6 is one of the second rank's in the second step.
    content[2 * 16 * shuffled(6, -(-len(content) // 2 // 16), mix(0, 0))] ^= 1
    file.write_bytes(content)
    words = train_on_ranks(build, 2, hook)
    damaged = f"WorkError: {file}: the tokenized data is damaged; run the command again, which makes it again"
    assert words == [damaged, damaged]
    assert train_on_ranks(build, 2, hook) == ["done", "done"]
