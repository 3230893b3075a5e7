"""What lies on the disk between two steps is what was written there, or is refused, or made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from minitron.cli.main import command_line
from minitron.runtime import evaluate, train
from minitron.specs.builds import VERIFICATION
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.listening import AtStep, Messages

SHORT = {"tokens": 64 * 3, "checkpoint": {"every_tokens": 64, "keep_last": 2}}


def run(build: Path, progress: Any = None, **more: Any) -> None:
    train(build, device="cpu", progress=progress or Silent(), **more)


def stopped(build: Path) -> None:
    """A training that was interrupted after its first steps."""
    tiny.write_plan(build, **SHORT)

    with pytest.raises(KeyboardInterrupt):
        run(build, AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def rewrite(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def perturb(file: Path) -> None:
    """Other numbers in the same places."""
    tensors = load_file(file)
    save_file({name: tensor + 0.25 for name, tensor in tensors.items()}, file, {"format": "pt"})


# --- the student that was verified ---

UNVERIFIED: dict[str, tuple[Callable[[Path], None], str]] = {
    "never": (
        lambda build: (build / VERIFICATION).unlink(),
        r"has no verification\.json: the student was not verified",
    ),
    "failed": (
        lambda build: rewrite(
            build / VERIFICATION, lambda one: one.update(passed=False, checks=[{"name": "reload", "passed": False}])
        ),
        r"the verification of .*student failed in its check reload, see verification\.json",
    ),
    "of no files": (lambda build: rewrite(build / VERIFICATION, lambda one: one.pop("student")), "which files were"),
    "other weights": (
        lambda build: perturb(build / "student" / "model.safetensors"),
        r"model\.safetensors has changed",
    ),
    "another configuration": (
        lambda build: rewrite(build / "student" / "config.json", lambda one: one.update(rms_norm_eps=1e-3)),
        r"is not the student that was verified: config\.json has changed; compile again, or add --unverified",
    ),
    "without its tokenizer": (
        lambda build: (build / "student" / "tokenizer.json").unlink(),
        "tokenizer.json is missing",
    ),
}


@pytest.mark.parametrize("kind", UNVERIFIED)
def test_a_student_that_was_not_verified_is_neither_trained_nor_measured(build: Path, kind: str) -> None:
    damage, message = UNVERIFIED[kind]
    if kind == "without its tokenizer":
        shutil.copytree(build / "student", build / "words")
        tiny.write_plan(build, tokenizer="words")
    damage(build)
    with pytest.raises(UsageError, match=message):
        run(build)
    with pytest.raises(UsageError, match=message):
        evaluate(build, device="cpu", progress=Silent())
    assert not (build / "model").exists() and not (build / "results.json").exists()


def test_it_is_where_a_user_says_so(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_plan(build, **SHORT)
    (build / VERIFICATION).unlink()
    assert command_line(["train", str(build), "--device", "cpu"]) == 2
    assert "or add --unverified to take it as it is" in capsys.readouterr().err
    assert command_line(["train", str(build), "--device", "cpu", "--unverified"]) == 0
    assert (build / "model" / "model.safetensors").is_file()


# --- the same training ---

CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the teacher's weights": (
        lambda build: perturb(build.parent / "teacher" / "model.safetensors"),
        r"teacher\.model: the teacher changed since this training began; bring back what was there, or delete",
    ),
    "the teacher's configuration": (
        lambda build: rewrite(build.parent / "teacher" / "config.json", lambda one: one.update(rms_norm_eps=1e-2)),
        r"teacher\.model: the teacher changed since this training began",
    ),
    "the student's weights": (
        lambda build: perturb(build / "student" / "model.safetensors"),
        r"student\.model: the pruned student changed since this training began",
    ),
    "the student's configuration": (
        lambda build: rewrite(build / "student" / "config.json", lambda one: one.update(rms_norm_eps=1e-2)),
        r"student\.model: the pruned student changed since this training began",
    ),
    "the held-out text": (
        lambda build: (build.parent / "valid.txt").write_text(tiny.text(30, seed=9)),
        r"held_out\.data: the held-out text or its tokenizer changed since this training began",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_training_goes_on_with_what_it_began_with(build: Path, what: str) -> None:
    change, message = CHANGES[what]
    stopped(build)
    change(build)
    tiny.verify(build)  # as if it had been compiled again
    with pytest.raises(SpecInvalid, match=message):
        run(build)


def test_the_held_out_text_may_be_left_out_on_the_way(build: Path) -> None:
    stopped(build)
    tiny.write_plan(build, **SHORT, held_out=None)
    run(build)
    assert (build / "model" / "model.safetensors").is_file()


# --- the model that was trained ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda build: [one.unlink() for one in (build / "model").iterdir()] and None, "is missing"),
    "gone": (lambda build: shutil.rmtree(build / "model"), "is missing"),
    "without weights": (lambda build: (build / "model" / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut short": (lambda build: cut(build / "model" / "model.safetensors"), "model.safetensors is not whole"),
    "without a note": (lambda build: cut(build / "train" / "finished.json"), "finished.json cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_is_written_again(build: Path, how: str) -> None:
    damage, words = BROKEN[how]
    tiny.write_plan(build, **SHORT)
    run(build)
    weights = (build / "model" / "model.safetensors").read_bytes()
    damage(build)
    progress = Messages()
    run(build, progress)
    assert any("is broken" in text and words in text and "from the last checkpoint" in text for text in progress.texts)
    assert (build / "model" / "model.safetensors").read_bytes() == weights
    run(build, progress)
    assert progress.texts[-1].startswith("already trained")


def test_a_model_that_somebody_changed_is_kept(build: Path) -> None:
    tiny.write_plan(build, **SHORT)
    run(build)
    perturb(build / "model" / "model.safetensors")
    changed = (build / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"model\.safetensors is not the file that training wrote; move .* away"):
        run(build)
    assert (build / "model" / "model.safetensors").read_bytes() == changed


def test_without_checkpoints_nothing_is_trained_anew_unasked(build: Path) -> None:
    tiny.write_plan(build, **SHORT)
    run(build)
    shutil.rmtree(build / "model")
    shutil.rmtree(build / "train" / "checkpoints")
    with pytest.raises(WorkError, match=r"is broken .* no checkpoint to write it again from; delete .*train to train"):
        run(build)
    assert not (build / "model").exists()


# --- the corrected teacher ---

CORRECTED: dict[str, Any] = SHORT | {
    "teacher_correction": {
        "tokens": 64 * 2,
        "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 1},
        "every_tokens": 64,
        "output": "teacher",
        "work": "train/teacher",
    }
}


def without_the_student(build: Path) -> Path:
    """A build whose teacher is corrected and whose student is to be trained; the teacher's weights."""
    tiny.write_plan(build, **CORRECTED)
    run(build)
    shutil.rmtree(build / "model")
    for name in ("checkpoints", "finished.json", "metrics.jsonl"):
        path = build / "train" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return build / "teacher" / "model.safetensors"


def test_a_corrected_teacher_that_is_cut_short_is_written_again(build: Path) -> None:
    weights = without_the_student(build)
    before = weights.read_bytes()
    cut(weights)
    run(build)
    assert weights.read_bytes() == before


def test_a_corrected_teacher_that_somebody_changed_is_kept_and_nobody_learns_from_it(build: Path) -> None:
    weights = without_the_student(build)
    perturb(weights)
    changed = weights.read_bytes()
    with pytest.raises(
        UsageError, match=r"teacher/model\.safetensors is not the file that training wrote; move .* away"
    ):
        run(build)
    assert weights.read_bytes() == changed and not (build / "model").exists()
