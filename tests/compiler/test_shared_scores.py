"""Scores are made once for all specs of a teacher and its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron.compiler.importance.score_file import read_scores, write_scores
from minitron.compiler.importance.scores import ScoreTable
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


def test_scores_whose_bytes_changed_are_none(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, "key", ScoreTable())
    assert read_scores(path, "key") is not None and read_scores(path, "other") is None
    path.write_bytes(path.read_bytes().replace(b"crc32", b"crc31"))
    assert read_scores(path, "key") is None
