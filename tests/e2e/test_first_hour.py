"""The first hour with it, in an empty repository: what was done once is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron.cli.main import command_line
from tests import models

TRAINED = ["--set", "distill.tokens=2K", "--set", "distill.sequence_length=32", "--set", "distill.global_batch_size=4"]
SIX_LINES = """\
name: small
teacher: {model: teacher}
student: {intermediate_size: 24}
distill:
  data: {text: [corpus.txt]}
  tokens: 20K
"""


class Shell:
    """Runs commands and keeps what they said."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.out = self.said = ""

    def __call__(self, *arguments: str) -> int:
        self.capfd.readouterr()
        code = command_line(list(arguments))
        self.out, self.said = self.capfd.readouterr()
        return code


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """In a repository with a teacher and its text, and nothing else."""
    monkeypatch.delenv("MINITRON_CACHE")
    monkeypatch.chdir(tmp_path)
    models.save_teacher(tmp_path / "teacher", models.tiny_config("llama", num_hidden_layers=2))
    for name, seed, lines in (("corpus", 0, 150), ("valid", 1, 20)):
        Path(f"{name}.txt").write_text(models.text(lines, seed), encoding="utf-8")
    return Shell(capfd)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".minitron.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_smallest_spec_has_six_lines(shell: Shell) -> None:
    Path("spec.yaml").write_text(SIX_LINES)
    assert shell("plan", "spec.yaml", "--json") == 0
    plan = json.loads(shell.out)
    assert plan["student"]["widths"]["intermediate_size"] == 24
    assert plan["spec"]["resolved"]["importance"]["data"]["text"] == ["corpus.txt"]


def test_a_short_training_searches_its_rate(shell: Shell) -> None:
    data = ["--data", "corpus.txt", "--held-out", "valid.txt"]
    assert shell("init", "--teacher", "teacher", "--target", "70%", *data, "-o", "spec.yaml") == 0
    assert shell("run", "spec.yaml", "--device", "cpu") == 0
    assert "search: rung 2 of 2" in shell.said
    (build,) = (path for path in Path("builds").iterdir() if not path.name.startswith("."))
    search = json.loads((build / "results.json").read_text())["search"]
    rates = {one["lr"] for one in search["candidates"]}
    assert len(rates) == 3 and search["winner"] in {one["number"] for one in search["candidates"]}
    before = contents(build)
    assert shell("compile", "spec.yaml", "--device", "cpu") == 0 and "is up to date with" in shell.said
    assert contents(build) == before


def test_from_nothing_to_a_report(shell: Shell) -> None:
    assert shell("init", "--teacher", "teacher", "--target", "70%", "--data", "corpus.txt", "-o", "spec.yaml") == 0
    assert Path("minitron.schema.json").is_file() and "builds/" in Path(".gitignore").read_text()
    assert "next: minitron plan spec.yaml" in shell.said
    assert shell("plan", "spec.yaml") == 0 and "is not compiled yet" in shell.out

    assert shell("run", "spec.yaml", *TRAINED, "--device", "cpu") == 0
    assert "tokenized" in shell.said and "calibrate" in shell.said
    (build,) = (path for path in Path("builds").iterdir() if not path.name.startswith("."))
    first = contents(build)
    assert {"model/config.json", "results.json", "student/model.safetensors"} <= first.keys()

    # The same again only looks.
    assert shell("run", "spec.yaml", *TRAINED, "--device", "cpu") == 0
    assert "is up to date with" in shell.said and "already trained" in shell.said

    # Another rate is refused before anything is written, and has a way on.
    rate = ["--set", "distill.optimizer.lr=7e-4"]
    before = contents(build)
    assert shell("run", "spec.yaml", *TRAINED, *rate, "--device", "cpu") == 2
    assert "distill.optimizer.lr: was" in shell.said and "add --fresh" in shell.said
    assert contents(build) == before

    # An added measurement measures, and compiles, verifies and trains nothing.
    held_out = ["--set", "evaluate.held_out={text: [valid.txt], document: line}"]
    assert shell("run", "spec.yaml", *TRAINED, *held_out, "--device", "cpu") == 0
    assert "training.yaml and plan.json are renewed" in shell.said and "already trained" in shell.said
    assert not any(work in shell.said for work in ("calibrate", "verify:", "write student"))
    results = json.loads((build / "results.json").read_text())
    assert results["models"]["distilled"]["held_out"]["loss"] > 0
    assert contents(build)["model/model.safetensors"] == first["model/model.safetensors"]

    # A new build of the same teacher and data: neither scores nor tokens are made again, and nothing was deleted.
    assert shell("run", "spec.yaml", *TRAINED, *rate, *held_out, "--device", "cpu", "--fresh") == 0
    assert "scores: taken from" in shell.said and "tokenized" not in shell.said
    assert contents(build.with_name(f"{build.name}.1"))["model/model.safetensors"] == first["model/model.safetensors"]
    assert contents(build)["model/model.safetensors"] != first["model/model.safetensors"]

    assert shell("show", str(build), "--html") == 0 and (build / "report.html").is_file()
    assert shell("cache", "--json") == 0
    assert {one["kind"] for one in json.loads(shell.out)["entries"]} == {"checks", "scores", "tokens"}
