"""Float8 that cannot be computed here is told before anything long: by `validate` as a warning, by `run` as a refusal."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from minitron.cli.main import command_line
from minitron.cli.output import configure

SPEC = """\
teacher: {model: teacher, compute: float8}
student: {intermediate_size: 24}
distill: {data: {text: [corpus.txt]}, tokens: 100K, compute: float8}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec whose teacher is an empty folder: whatever looks into it says so."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path / "spec.yaml"


@pytest.fixture
def no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else real(name, *a))


def test_a_valid_spec_is_valid_and_warns(spec: Path, no_torchao: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure([])
    assert command_line(["validate", str(spec)]) == 0
    said = capsys.readouterr().err
    for place in ("3:62: distill.compute", "1:36: teacher.compute"):
        assert f"{place}: float8 is computed by torchao, which is not installed here; pip install" in said
    spec.write_text(SPEC.replace("float8", "bfloat16"))
    assert command_line(["validate", str(spec)]) == 0 and "torchao" not in capsys.readouterr().err


def test_a_run_ends_before_it_compiles(spec: Path, no_torchao: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure([])
    assert command_line(["run", str(spec), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "distill.compute: float8 is computed by torchao" in said and "write bfloat16" in said
    assert "config.json" not in said and not (spec.parent / "builds").exists()


def test_a_run_on_a_device_that_cannot(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    from minitron.cli import run_command

    monkeypatch.setattr(run_command, "pick_device", lambda name: "cuda")
    monkeypatch.setattr(run_command, "process_count", lambda *_: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
    configure([])
    assert command_line(["run", str(spec)]) == 2
    said = capsys.readouterr().err
    wanted = "NVIDIA RTX A6000 has compute capability 8.6, and float8 needs 8.9 or later; write bfloat16"
    assert f"distill.compute: {wanted}" in said and f"teacher.compute: {wanted}" in said
