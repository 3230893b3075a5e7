"""Scores and checks of a teacher are made once for all specs of it and its data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from minitron.compiler import compile_spec, score, teacher_checks, verify_build
from minitron.compiler.compilation import Work
from minitron.compiler.importance.score_file import read_scores, write_scores
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.verify.checks import exactly
from minitron.specs.errors import SpecInvalid
from minitron.specs.progress import Silent
from tests.foundry import Foundry


class Named(Silent):
    """Keeps the names of the work that was shown, and the messages."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.messages: list[str] = []

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        self.names.append(name)
        return super().task(name, total, unit, done)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def test_another_spec_of_the_same_teacher_and_data_calibrates_no_more(
    foundry: Foundry, cache: Path, tmp_path: Path
) -> None:
    teacher, builds = foundry.teacher("llama", num_hidden_layers=2), tmp_path / "builds"
    foundry.compile(foundry.load(teacher, {"intermediate_size": 24}), builds / "a", first := Named(), program=False)
    assert "calibrate" in first.names
    other = foundry.load(teacher, {"hidden_size": 24, "num_hidden_layers": 1}, name="other")
    foundry.compile(other, builds / "b", second := Named(), program=False)
    assert "calibrate" not in second.names
    (entry,) = (cache / "scores").iterdir()
    assert f"scores: taken from {entry}" in second.messages
    assert entry.samefile(builds / "a" / "scores.safetensors") and entry.samefile(builds / "b" / "scores.safetensors")

    # A damaged entry is found out by its checksum and made again; other settings have scores of their own.
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.unlink()
    entry.write_bytes(content)
    foundry.compile(other, builds / "c", third := Named(), program=False)
    assert "calibrate" in third.names and entry.samefile(builds / "c" / "scores.safetensors")
    data = foundry.calibration | {"samples": 4}
    less = foundry.load(teacher, {"intermediate_size": 24}, importance={"data": data})
    foundry.compile(less, builds / "d", fourth := Named(), program=False)
    assert "calibrate" in fourth.names and len(list((cache / "scores").iterdir())) == 2


def test_a_teacher_is_checked_once(foundry: Foundry, cache: Path, tmp_path: Path) -> None:
    """By all specs of it, until a weight changes; `minitron verify` and --force look again."""
    teacher, builds = tmp_path / "teacher", tmp_path / "builds"
    shutil.copytree(foundry.teacher("llama", num_hidden_layers=2), teacher)
    loaded, other = (foundry.load(teacher, {"intermediate_size": width}) for width in (24, 32))
    foundry.compile(loaded, builds / "a", first := Named(), program=False)
    foundry.compile(other, builds / "b", second := Named(), program=False)
    assert "verify the teacher" in first.names and "verify the teacher" not in second.names
    (entry,) = (cache / "checks").iterdir()
    assert f"checks of the teacher: taken from {entry}" in second.messages
    ours, theirs = (json.loads((builds / one / "verification.json").read_text()) for one in "ab")
    assert [one["name"] for one in ours["checks"]] == [one["name"] for one in theirs["checks"]]
    assert ours["checks"][:2] == theirs["checks"][:2] and ours["checks"][0]["tolerance"] > 0

    with foundry.shortened():
        compile_spec(other, builds / "b", device="cpu", progress=(third := Named()), work=Work(fresh=True))
        verify_build(builds / "b", device="cpu", progress=(fourth := Named()))
    assert "verify the teacher" in third.names and "verify the teacher" in fourth.names

    entry.write_text(entry.read_text().replace('"passed": true', '"passed": false', 1))
    foundry.compile(loaded, builds / "c", fifth := Named(), program=False)
    assert "verify the teacher" in fifth.names, "an entry that says that a check failed is none"
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    foundry.compile(loaded, builds / "d", sixth := Named(), program=False)
    assert "verify the teacher" in sixth.names and len(list((cache / "checks").iterdir())) == 2


def test_a_teacher_that_failed_is_checked_again(
    foundry: Foundry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), {"intermediate_size": 24})
    monkeypatch.setattr(teacher_checks, "verify_teacher", lambda compilation: [exactly("teacher", "it differs", "")])
    for name in "ab":
        with pytest.raises(SpecInvalid, match="cannot be compiled: it differs"):
            foundry.compile(loaded, tmp_path / "builds" / name, program=False)
    assert list((cache / "checks").iterdir()) == []


def test_scores_of_another_device_are_not_taken(
    foundry: Foundry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a build is verified with the scores that it was made with, wherever that was."""
    loaded, builds = (
        foundry.load(foundry.teacher("llama", num_hidden_layers=2), {"intermediate_size": 24}),
        tmp_path / "b",
    )
    with monkeypatch.context() as patch:
        patch.setattr(score, "_made", lambda compilation: "cuda torch.bfloat16")
        foundry.compile(loaded, builds / "a")
    foundry.compile(loaded, builds / "b", second := Named(), program=False)
    assert "calibrate" in second.names and len(list((cache / "scores").iterdir())) == 2
    before = (builds / "a" / "scores.safetensors").stat().st_ino
    with foundry.shortened():
        verify_build(builds / "a", device="cpu", progress=(third := Named()))
    assert "calibrate" not in third.names and (builds / "a" / "scores.safetensors").stat().st_ino == before


def test_scores_whose_bytes_changed_are_none(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, "key", ScoreTable())
    assert read_scores(path, "key") is not None and read_scores(path, "other") is None
    path.write_bytes(path.read_bytes().replace(b"crc32", b"crc31"))
    assert read_scores(path, "key") is None
