"""A user's files are never destroyed: what is replaced or removed carries our mark, and folders do not contain one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.cli.main import command_line
from minitron.runtime import evaluate, record, train
from minitron.specs.atomic import MARKER, temporary_path
from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.locks import only_one
from minitron.specs.progress import Silent
from tests.foundry import Foundry
from tests.runtime import tiny

SHORT = {"tokens": 64, "checkpoint": {"every_tokens": 64, "keep_last": 1}, "held_out": None}
CORRECTION: dict[str, Any] = {"tokens": 64, "every_tokens": 64, "output": "teacher", "work": "train/teacher"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; what a lock leaves is nobody's work."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".minitron.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "a folder beside the build": (
        {"output": "../other"},
        r"output: .*other lies outside of the build; write a folder ins",
    ),
    "the build": ({"output": "."}, r"output: .* is the build itself or contains it; write a folder of its own"),
    "what holds the build": ({"work": ".."}, r"work: .* is the build itself or contains it"),
    "the student": ({"output": "student"}, r"output: .*student and the student contain one another"),
    "within the student": ({"work": "student/train"}, r"work: .*train and the student contain one another"),
    "the stored logits": ({"work": "teacher_logits"}, r"work: .* and the stored teacher logits contain one another"),
    "one folder for both": ({"output": "train"}, r"output: .*train and the folder of `work` contain one another"),
    "a model among checkpoints": (
        {"output": "train/checkpoints"},
        r"output: .* the folder of `work` contain one another",
    ),
    "checkpoints in a model": (
        {"work": "model/train"},
        r"output: .*model and the folder of `work` contain one another",
    ),
    "a correction elsewhere": (
        {"teacher_correction": CORRECTION | {"work": "../other"}},
        r"teacher_correction\.work: .*other lies outside of the build",
    ),
    "a correction among checkpoints": (
        {"teacher_correction": CORRECTION | {"work": "train/checkpoints/x"}},
        r"teacher_correction\.work: .* and the folder of `work` contain one another",
    ),
    "a corrected teacher over the model": (
        {"teacher_correction": CORRECTION | {"output": "model"}},
        r"teacher_correction\.output: .*model and the folder of `output` contain one another",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_must_not_be_written_to(build: Path, kind: str) -> None:
    changes, message = FOLDERS[kind]
    tiny.write_plan(build, **SHORT, **changes)
    (build.parent / "other").mkdir()
    (build.parent / "other" / "thesis.txt").write_text("years of work")
    before = contents(build.parent)
    for command in (train, evaluate):
        with pytest.raises(SpecInvalid, match=message):
            command(build, device="cpu", progress=Silent())
    assert contents(build.parent) == before


def test_the_teacher_is_not_written_over_even_where_folders_may_lie_outside(build: Path) -> None:
    tiny.write_plan(build, **SHORT, output="../teacher")
    before = contents(build.parent)
    with pytest.raises(SpecInvalid, match=r"output: .*teacher and the teacher contain one another"):
        train(build, device="cpu", progress=Silent(), outside=True)
    assert contents(build.parent) == before


def test_a_link_does_not_lead_outside_unseen(build: Path) -> None:
    tiny.write_plan(build, **SHORT)
    (build.parent / "disk").mkdir()
    (build / "train").symlink_to(build.parent / "disk", target_is_directory=True)
    with pytest.raises(SpecInvalid, match=r"work: .*disk lies outside of the build; .* or add --allow-outside"):
        train(build, device="cpu", progress=Silent())


def test_folders_outside_where_a_user_says_so(build: Path) -> None:
    tiny.write_plan(build, **SHORT, work="../disk/train", output="../disk/model")
    assert command_line(["train", str(build), "--device", "cpu"]) == 2
    assert not (build.parent / "disk").exists()
    assert command_line(["train", str(build), "--device", "cpu", "--allow-outside"]) == 0
    assert (build.parent / "disk" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model", "train"])
def test_what_somebody_else_made_is_kept(build: Path, name: str) -> None:
    """A user's own model and a user's own metrics, under the names that training writes."""
    tiny.write_plan(build, **SHORT)
    (build / name).mkdir()
    (build / name / "metrics.jsonl").write_text("mine")
    before = contents(build / name)
    with pytest.raises(
        UsageError, match=r"was not made by minitron, and would|metrics\.jsonl, which minitron did not make"
    ):
        train(build, device="cpu", progress=Silent())
    assert contents(build / name) == before


def test_a_model_that_is_a_link_is_kept(build: Path) -> None:
    tiny.write_plan(build, **SHORT)
    train(build, device="cpu", progress=Silent())
    (build / "model").rename(build / "kept")
    (build / "model").symlink_to("kept")
    before = contents(build / "kept")
    tiny.write_plan(build, **SHORT | {"tokens": 128})
    with pytest.raises(UsageError, match=r"model is a link, and would be replaced"):
        train(build, device="cpu", progress=Silent())
    assert (build / "model").is_symlink() and contents(build / "kept") == before


def test_hidden_files_of_a_user_are_no_leftovers(build: Path) -> None:
    tiny.write_plan(build, **SHORT)
    mine = [build / ".notes.tmp", build / ".model.tmp", build / ".model.1.tmp", build / "train" / "data" / ".mine.tmp"]
    (build / "train" / "data").mkdir(parents=True)
    (build / "train" / MARKER).write_text("")
    for path in mine:
        path.write_text("mine")
    ours = [temporary_path(build / "model", 17), temporary_path(build / "train" / "data" / "ab", 17)]
    for path in ours:
        path.mkdir()
    train(build, device="cpu", progress=Silent())
    assert all(path.is_file() for path in mine) and not any(path.exists() for path in ours)


def test_a_correction_with_other_settings_removes_only_what_the_first_one_wrote(build: Path) -> None:
    tiny.write_plan(build, **SHORT, teacher_correction=CORRECTION)
    train(build, device="cpu", progress=Silent())
    notes = build / "train" / "teacher" / "notes.txt"
    notes.write_text("why these settings")
    changed = CORRECTION | {"optimizer": {"lr": 1e-3}}
    tiny.write_plan(build, **SHORT, teacher_correction=changed, teacher_logits={"sampled": 4})
    record(build, device="cpu", progress=Silent())
    assert notes.read_text() == "why these settings"
    identity = json.loads((build / "teacher" / "correction.json").read_text())["identity"]
    assert identity["optimizer.lr"] == 1e-3


def test_a_compile_into_somebody_elses_folder(foundry: Foundry, tmp_path: Path) -> None:
    loaded = foundry.load(foundry.teacher("llama"), {"intermediate_size": 24})
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    from minitron.compiler import compile_spec

    with pytest.raises(
        UsageError, match=r"holds student, which minitron did not make; move it away, or name another with -o"
    ):
        compile_spec(loaded, tmp_path, device="cpu", progress=Silent())
    assert contents(tmp_path) == before


# --- one at a time ---


@pytest.mark.parametrize("command", [train, evaluate, record])
@pytest.mark.parametrize("doing", ["compiling", "training", "evaluating"])
def test_one_command_at_a_time_writes_into_a_build(build: Path, command: Any, doing: str) -> None:
    tiny.write_plan(build, **SHORT, **({"teacher_logits": {"sampled": 4}} if command is record else {}))
    message = rf"another process is {doing} \(process \d+ on .+\) in .*build; wait for it or stop it first"
    with only_one(build, doing), pytest.raises(UsageError, match=message):
        command(build, device="cpu", progress=Silent())
