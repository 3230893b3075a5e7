"""Specs, bases and lock files that are no files, or endless, are refused within a moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minitron.cli.main import command_line
from minitron.specs import SpecInvalid, UsageError, load_spec, small_files


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "large.yaml", "nul\0.yaml"])
def test_a_spec_or_a_base_that_is_none(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "LARGEST_BYTES", 1 << 20)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("#" * (3 << 20))
    why = {"large.yaml": "it has 3 MiB: name the right file", "nul\0.yaml": "embedded null"}.get(
        name, "is not a regular file"
    )
    with pytest.raises(UsageError, match=f"cannot be a spec: .*{why}"):
        load_spec(tmp_path / name)
    if "\0" in name:
        return
    (tmp_path / "spec.yaml").write_text(f"extends: {name}\n")
    with pytest.raises(SpecInvalid, match=f"extends: `{name}`: cannot be read .*{why}"):
        load_spec(tmp_path / "spec.yaml")


def test_the_command_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["validate", "/dev/zero"]) == 2
    assert "/dev/zero: cannot be a spec: it is not a regular file" in capsys.readouterr().err
