"""`minitron compile --memory` and `--force`: neither changes a byte of the student."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minitron.cli.main import command_line
from tests import models


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    models.save_teacher(tmp_path / "teacher", models.tiny_config("llama", num_hidden_layers=1))
    (tmp_path / "corpus.txt").write_text(models.text(60), encoding="utf-8")
    data = {"text": ["corpus.txt"], "document": "line", "samples": 4, "sequence_length": 24}
    document = {
        "name": "tiny", "teacher": {"model": "teacher"}, "student": {"intermediate_size": 24}, "importance": {"data": data},
    }  # fmt: skip
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "spec.yaml"


def test_memory_and_force(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = spec.parent / "build"
    scores, weights = build / "scores.safetensors", build / "student" / "model.safetensors"

    def compiled(*options: str) -> tuple[str, int, bytes]:
        assert command_line(["compile", str(spec), "-o", str(build), "--device", "cpu", *options]) == 0
        return capsys.readouterr().err, scores.stat().st_ino, weights.read_bytes()

    _, first, written = compiled("--memory", "100MiB")
    words, second, again = compiled("--set", "importance.selection=scores", "--set", "student.intermediate_size=32")
    assert "scores: taken from" in words and first == second and again != written
    words, third, again = compiled("--force")
    assert "scores: taken from" not in words and third != second and again == written
    words, fourth, again = compiled("--force", "--memory", "64MiB")
    assert fourth != third and again == written


def test_memory_in_which_nothing_can_be_computed(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["compile", str(spec), "--memory", "0.5MiB"]) == 2
    assert "--memory 0.5MiB: fewer than 1 MiB; write a size as in 20GiB" in capsys.readouterr().err
    assert command_line(["compile", str(spec), "--memory", "much"]) == 2
    assert "write a size as in 20GiB" in capsys.readouterr().err
    assert not (spec.parent / "builds").exists()
