"""What validate prints, and what any command prints when it cannot do its work, is as documented in docs/json.md.

The documents of plan, show, diff, eval and lock are held against it where real ones are made (tests/e2e).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron.cli.main import command_line
from tests.output import conforms

SPEC = (
    "teacher: {model: org/model}\nstudent: {hidden_size: [32, 64]}\nsearch: {budget: {parameters: 1M}}\n"
    "distill: {data: {text: [a.txt]}, tokens: 1B}\nevaluate: {held_out: {text: [b.txt]}}\n"
)


def test_validate_with_errors_and_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text(SPEC)
    (tmp_path / "bad.yaml").write_text(SPEC.replace("student", "studnet"))
    files = [str(tmp_path / name) for name in ("good.yaml", "bad.yaml", "nowhere.yaml")]
    assert command_line(["validate", "--json", *files]) == 2
    document = json.loads(capsys.readouterr().out)
    conforms("validate", document)
    assert len(document["errors"]) == 2 and len(document["specs"]) == 1


def test_lock_files_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text(SPEC)
    (tmp_path / "good.lock.yaml").write_text("format_version: 1\n")
    assert command_line(["validate", str(tmp_path / "good.yaml"), str(tmp_path / "good.lock.yaml")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}/good.yaml: valid\n" and "good.lock.yaml: a lock file" in captured.err


@pytest.mark.parametrize(
    "call", [["plan", "nowhere.yaml"], ["show", "nowhere"], ["diff", "a", "b"], ["plan", "--nothing"]]
)
def test_a_command_that_cannot_do_its_work(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line([*call, "--json"]) == 2
    conforms("errors", json.loads(capsys.readouterr().out))
