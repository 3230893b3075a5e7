"""The files that a spec names, and one-line messages about what stands in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs import SpecError, UsageError, load_spec
from minitron.specs.one_line import LONGEST, message_text, one_line
from minitron.specs.references import references

from .conftest import Errors, Load


def test_every_path_is_found_at_its_place(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    text = """\
extends: base/one.yaml
teacher: {model: local}
importance: {data: {text: [../a/*.txt, python-stdlib:train]}}
distill: {data: {blend: [{jsonl: b.jsonl}, {dataset: org/name}, {parquet: /c.parquet}]}}
evaluate: {data_dir: d, held_out: {text: e}}
"""
    found = references(text.encode(), str(tmp_path / "spec.yaml"))
    assert [(one.key, one.place.line, str(one.target)) for one in found] == [
        ("extends", 1, str(tmp_path / "base/one.yaml")),
        ("teacher.model", 2, str(tmp_path / "local")),
        ("importance.data.text", 3, str(tmp_path.parent / "a/*.txt")),
        ("distill.data.blend.jsonl", 4, str(tmp_path / "b.jsonl")),
        ("distill.data.blend.parquet", 4, "/c.parquet"),
        ("evaluate.data_dir", 5, str(tmp_path / "d")),
        ("evaluate.held_out.text", 5, str(tmp_path / "e")),
    ]
    assert [one.is_spec for one in found] == [True] + [False] * 6
    assert references(b"teacher: {spec: up.yaml}", "spec.yaml")[0].is_spec
    assert references(b"a: [", "spec.yaml") == [] == references(b"- a", "spec.yaml")


@given(st.text())
def test_a_message_is_one_line_of_text(text: str) -> None:
    shown = one_line(text)
    assert shown.splitlines() in ([], [shown])
    shown.encode()
    assert one_line(shown) == shown
    if text.isprintable():
        assert shown == text


def test_control_characters_are_seen() -> None:
    assert one_line("a\nb\x1b[31m\u202e\udc80é\u3000") == "a\\nb\\x1b[31m\\u202e\\udc80é\u3000"


@pytest.mark.parametrize("cut", ["9" * 5000, "`" + "many words " * 500 + "`"])
def test_long_values_are_cut(cut: str) -> None:
    assert len(message_text(f"{cut} is not a width")) < LONGEST
    assert message_text(f"{cut} is not a width").endswith(" is not a width")


@pytest.mark.parametrize(
    "text",
    [
        "student: {hidden_size: " + "9" * 5000 + "}",
        "student: {hidden_size: [" + "x" * 5000 + "]}",
        "x" * 900 + ": 1",
        "name: " + "x" * 5000,
        "distill: {tokens: " + "7" * 5000 + "}",
        "distill: {optimizer: {lr: " + "a b " * 2000 + "}}",
        "importance: {data: {text: python-stdlib:" + "z" * 5000 + "}}",
    ],
)
def test_no_message_holds_thousands_of_characters(errors_of: Errors, text: str) -> None:
    assert all(len(str(error)) < 1000 for error in errors_of(text))


def test_a_key_cannot_write_a_line_of_its_own(errors_of: Errors) -> None:
    found = [error for error in errors_of('"a\\nother.yaml:1:1: all is well": 1') if "unknown" in error.message]
    ((error,),) = [found]
    assert "a\\nother.yaml" in error.path and len(str(error).splitlines()) == 1
    assert SpecError("a\n.yaml", 1, 1, "", "m").file == "a\n.yaml", "programs open the file"
    assert str(SpecError("a\n.yaml", 1, 1, "", "m")) == "a\\n.yaml:1:1: m"
    json.dumps(error.message).encode()


def test_nul_and_names_without_end_are_refused(load: Load, errors_of: Errors, tmp_path: Path) -> None:
    assert any("U+0000" in error.message for error in errors_of('extends: "a\\0b"'))
    assert "cannot be read" in errors_of("extends: " + "a" * 5000)[0].message
    model = load("teacher: {model: " + "a" * 5000 + "}\nstudent: {layers: {drop: [1]}}\n")
    assert model.spec.teacher.model == "a" * 5000
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "spec.yaml").write_text("extends: ../spec.yaml\n")
    load_spec(tmp_path / "deep" / "spec.yaml")


def test_deep_overrides_are_refused(load: Load) -> None:
    with pytest.raises(UsageError, match="more than 40 steps"):
        load("name: x", "a" + ".a" * 5000 + "=1")
