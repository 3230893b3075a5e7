"""`minitron data`: what training will see of the data that a spec names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.cli.main import command_line
from tests.models import WORDS, save_teacher, text, tiny_config
from tests.output import conforms

SPEC = """
teacher: {model: teacher}
student: {hidden_size: 24}
importance: {data: {text: [corpus.txt], document: line, samples: 4, sequence_length: 16}}
distill:
  data:
    blend:
      - {weight: 3, text: [corpus.txt], document: line}
      - {weight: 1, jsonl: [rows.jsonl], on_error: skip}
  tokens: 6400
  sequence_length: 16
  global_batch_size: 4
evaluate: {held_out: {text: [valid.txt]}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_teacher(folder / "teacher", tiny_config("llama"))
    (folder / "corpus.txt").write_text(text(50))
    rows = [json.dumps({"text": "the cat sat"}), "{", json.dumps({"text": None}), json.dumps({"text": "a \ud800 mat"})]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "valid.txt").write_text(text(5, seed=1))
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert command_line(["data", str(folder / "spec.yaml"), *options]) == 0
    return capsys.readouterr().out


def test_the_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = json.loads(shown(folder, capsys, "--json"))
    conforms("data", document)
    assert document["tokenizer"]["eos"] == "</s>" and document["tokenizer"]["bos"] is None
    assert list(document["sources"]) == ["importance.data", "distill.data", "evaluate.held_out"]
    lines, rows = document["sources"]["distill.data"]["parts"]
    assert (lines["documents"], lines["share"], lines["complete"]) == (50, 0.75, True)
    assert lines["repeats"] == pytest.approx(0.75 * 6400 / lines["tokens"], abs=1e-3) and lines["repeats"] > 1
    assert lines["samples"][0].split()[0] in WORDS and lines["samples"][0].endswith("</s>")
    assert (rows["documents"], rows["empty"], rows["unreadable"], rows["repaired"]) == (2, 1, 1, 1)
    assert "rows.jsonl:2: is not JSON" in rows["reasons"][0]
    (valid,) = document["sources"]["evaluate.held_out"]["parts"]
    assert valid["documents"] == 1 and valid["documents_over_a_sequence"] == 1
    assert valid["longest_document"] == valid["tokens"]


def test_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(folder, capsys)
    assert "distill.data" in out and "text: corpus.txt" in out and "75.0%" in out
    assert "jsonl: rows.jsonl: left out:" in out and "jsonl: rows.jsonl: sample 1: the" in out


def test_a_part_is_estimated_and_all_is_read_on_request(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.compiler.data_report.SURVEYED", 500)
    (part,) = json.loads(shown(folder, capsys, "--json"))["sources"]["importance.data"]["parts"]
    (whole,) = json.loads(shown(folder, capsys, "--json", "--all"))["sources"]["importance.data"]["parts"]
    assert not part["complete"] and part["documents"] < 50 and whole["complete"] and whole["documents"] == 50
    assert whole["estimated_tokens"] == whole["tokens"]
    assert part["estimated_tokens"] == pytest.approx(whole["tokens"], rel=0.2)


def test_data_that_cannot_be_read_has_its_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.yaml").write_text(SPEC.replace(", on_error: skip", ""))
    assert command_line(["data", str(folder / "bad.yaml")]) == 2
    assert "bad.yaml:9:" in (err := capsys.readouterr().err) and "rows.jsonl:2: is not JSON" in err
    (folder / "none.yaml").write_text("teacher: {model: teacher}\nstudent: {layers: {drop: [0]}}\n")
    assert command_line(["data", str(folder / "none.yaml")]) == 2
    assert "names no data; add `importance.data`" in capsys.readouterr().err
