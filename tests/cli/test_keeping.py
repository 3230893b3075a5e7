"""doctor, list, clean; and how much a command says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minitron.cli.main import command_line


@pytest.fixture
def trained(tmp_path: Path, plan: dict[str, Any], verification: dict[str, Any], results: dict[str, Any]) -> Path:
    """A build whose training is complete, as its documents say."""
    build = tmp_path / "specs" / "builds" / "tiny"
    for folder in ("student", "model", "train/checkpoints/1", "train/data"):
        (build / folder).mkdir(parents=True)
    for name, content in (("plan.json", plan), ("verification.json", verification), ("results.json", results)):
        (build / name).write_text(json.dumps(content))
    (build / "training.yaml").write_text("tokens: 100\n")
    (build / "train" / "finished.json").write_text("{}")
    for name in ("train/checkpoints/1/weights", "train/data/tokens.bin", "train/metrics.jsonl", "model/weights"):
        (build / name).write_bytes(b"x" * 1000)
    return build


def test_builds_are_listed_with_state_and_loss(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = trained.parents[2]
    (root / "specs" / "builds" / "broken").mkdir()
    (root / "specs" / "builds" / "broken" / "plan.json").write_text("{")
    assert command_line(["list", str(root)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"tiny +130,016 +50.0% +trained and measured +1.5", text) and re.search(r"broken .*damaged", text)
    assert command_line(["list", str(root), "--json"]) == 0
    states = {Path(one["build"]).name: one["state"] for one in json.loads(capsys.readouterr().out)["builds"]}
    assert states == {"broken": "damaged", "tiny": "trained and measured"}
    (trained / "train" / "finished.json").unlink()
    assert command_line(["list", str(root), "--json"]) == 0
    assert "compiled" in capsys.readouterr().out
    assert command_line(["list", str(trained / "student")]) == 0
    assert "no builds below it" in capsys.readouterr().err


def test_clean_lists_first_and_leaves_what_is_needed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["clean", str(trained)]) == 0
    assert "1.95 KiB could go" in capsys.readouterr().out and (trained / "train" / "checkpoints").is_dir()
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert not (trained / "train" / "checkpoints").exists() and not (trained / "train" / "data").exists()
    assert (trained / "model" / "weights").is_file() and (trained / "train" / "metrics.jsonl").is_file()
    capsys.readouterr()
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_clean_removes_what_a_search_left_once_its_winner_is_trained(trained: Path) -> None:
    for name in ("student", "checkpoints"):
        (trained / "search" / "07" / name).mkdir(parents=True)
        (trained / "search" / "07" / name / "weights").write_text("x")
    (trained / "search" / "ranking.json").write_text("{}")
    note = (trained / "train" / "finished.json").read_bytes()
    (trained / "train" / "finished.json").unlink()
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert (trained / "search" / "07" / "checkpoints" / "weights").is_file(), "a training begins there"
    (trained / "train" / "finished.json").write_bytes(note)
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert not list((trained / "search" / "07").iterdir()) and (trained / "search" / "ranking.json").is_file()


def test_clean_removes_what_an_interrupted_compile_left_beside_a_whole_one(trained: Path) -> None:
    left = [trained / f".minitron-{name}.tmp" for name in ("compile", "refit")] + [trained / "scores.partial.streams"]
    others = trained / ".minitron-model.123.tmp"
    for folder in (*left, others):
        folder.mkdir()
        (folder / "file").write_text("x")
    kept = (trained / "verification.json").rename(trained / "aside")
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert all(folder.is_dir() for folder in left), "the next compile goes on with them"
    kept.rename(trained / "verification.json")
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert not any(folder.exists() for folder in left) and others.is_dir(), "a training may be writing there"


def test_clean_keeps_a_training_that_can_go_on_and_follows_no_links(trained: Path, tmp_path: Path) -> None:
    (trained / "train" / "finished.json").unlink()
    (trained / "train" / "data" / "tokens.bin").unlink()
    (trained / "train" / "data").rmdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (trained / "train" / "data").symlink_to(tmp_path / "mine")
    assert command_line(["clean", str(trained), "--yes"]) == 0
    assert (trained / "train" / "checkpoints" / "1" / "weights").is_file() and (tmp_path / "mine" / "file").is_file()
    assert command_line(["clean", str(tmp_path), "--yes"]) == 2


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["doctor", "--json"]) == 0
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    import torch

    assert found["torch"]["found"] == torch.__version__ and "memory" in found
    assert all(one["found"] for one in found.values())
    assert command_line(["doctor"]) == 0
    assert "Advice" in capsys.readouterr().out


def test_quiet_and_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    assert command_line(["init", "-o", str(tmp_path / "a.yaml"), "--quiet", "--log-file", str(log)]) == 0
    out, err = capsys.readouterr()
    assert out and not err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d next: minitron plan .*a.yaml\n", log.read_text())
    assert command_line([f"--log-file={log}", "init", "-o", str(tmp_path / "a.yaml"), "--quiet"]) == 2
    assert "exists already" in capsys.readouterr().err and "exists already" in log.read_text(), "errors are always said"
    for wrong, words in (
        (["--quiet", "--verbose"], "choose one"),
        (["--log-file"], "names no file"),
        (["--log-file", str(tmp_path)], "cannot be written"),
    ):
        assert command_line(["schema", *wrong]) == 2
        assert words in capsys.readouterr().err
    assert command_line(["schema"]) == 0
