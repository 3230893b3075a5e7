"""`minitron cache`: lists what builds share, and removes what is not used."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from minitron.cli.main import command_line
from minitron.specs.cache import SCORES, entry_path


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MINITRON_CACHE")
    for name, days in (("new", 0), ("old", 40)):
        path = entry_path(tmp_path / "builds" / "a", SCORES, name)
        assert path is not None
        path.write_bytes(bytes(2048))
        os.utime(path, (time.time() - 86_400 * days,) * 2)
    return tmp_path / "builds"


def test_it_lists_and_removes(builds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["cache", str(builds)]) == 0
    shown = capsys.readouterr().out
    assert "old" in shown and "new" in shown and "4.00 KiB" in shown
    assert command_line(["cache", str(builds), "--prune", "--unused", "30d", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["removed"] and [Path(one["path"]).name for one in content["entries"]] == ["old"]
    assert [path.name for path in (builds / ".cache" / "scores").iterdir()] == ["new"]
    assert command_line(["cache", str(builds), "--prune"]) == 0
    assert list((builds / ".cache" / "scores").iterdir()) == []
    capsys.readouterr()
    assert command_line(["cache", str(builds)]) == 0 and "there is nothing" in capsys.readouterr().err


def test_pruning_removes_what_killed_processes_left(builds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = builds / ".cache" / "scores" / ".minitron-key.17.tmp"
    left.write_text("half")
    assert command_line(["cache", str(builds), "--prune", "--unused", "30d"]) == 0 and left.exists()
    os.utime(left, (time.time() - 100_000,) * 2)
    assert command_line(["cache", str(builds)]) == 0 and left.exists()
    assert command_line(["cache", str(builds), "--prune", "--unused", "30d"]) == 0 and not left.exists()


def test_wrong_calls(builds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["cache", str(builds), "--unused", "long"]) == 2
    assert "--unused long: not a time; write 30d, 12h or 90m" in capsys.readouterr().err
    monkeypatch.setenv("MINITRON_CACHE", "none")
    assert command_line(["cache", str(builds)]) == 2
    assert "MINITRON_CACHE is none: there is no cache" in capsys.readouterr().err
