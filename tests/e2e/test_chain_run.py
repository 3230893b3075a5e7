"""A chain from the command line: one `run` brings both specs to their end, and changes above are noticed below."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from minitron.cli.main import command_line
from tests.foundry import Foundry
from tests.output import conforms

SHARED = """\
importance: {data: {text: [corpus.txt], document: line, samples: 4, sequence_length: 32}}
distill:
  data: {text: [corpus.txt], document: line}
  tokens: 512
  sequence_length: 32
  global_batch_size: 8
  optimizer: {lr: 1e-3}
evaluate: {held_out: {text: [held_out.txt], document: line}}
"""
LARGE = "teacher: {model: teacher, dtype: float32}\nstudent: {layers: {drop: [1]}}\n" + SHARED
SMALL = "teacher:\n  spec: large.yaml\n  dtype: float32\nstudent: {layers: {drop: [0]}}\n" + SHARED


class Chain:
    """A folder with two specs, and the commands in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], foundry: Foundry) -> None:
        self.folder, self.capsys, self.foundry = folder, capsys, foundry

    def __call__(self, command: str, *options: str, spec: str = "small.yaml") -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        device = ["--device", "cpu"] if command in ("run", "compile") else []
        with self.foundry.shortened():
            code = command_line([command, str(self.folder / spec), *device, *options])
        return (code, *self.capsys.readouterr())

    def build(self, name: str) -> Path:
        return self.folder / "builds" / name


@pytest.fixture
def chain(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], foundry: Foundry) -> Chain:
    for name in ("teacher", "corpus.txt", "held_out.txt"):
        (tmp_path / name).symlink_to(workshop / name)
    (tmp_path / "large.yaml").write_text(LARGE)
    (tmp_path / "small.yaml").write_text(SMALL)
    return Chain(tmp_path, capsys, foundry)


def test_a_chain_from_the_first_run_to_a_change_above(chain: Chain) -> None:
    code, out, err = chain("compile")
    assert (code, out) == (2, "") and "small.yaml:2:9: teacher.spec: `large.yaml` has no result yet" in err

    assert chain("lock")[0] == 0
    assert {path.name for path in chain.folder.glob("*.lock.yaml")} == {"large.lock.yaml", "small.lock.yaml"}

    code, out, err = chain("run", "--locked")
    assert code == 0, err
    assert "large.yaml: its result becomes the teacher, so it runs first" in err
    assert out.index("Plan large") < out.index("Plan small") < out.index("Results")
    assert [(chain.build(name) / "model" / "config.json").is_file() for name in ("large", "small")] == [True, True]
    assert yaml.safe_load((chain.build("small") / "training.yaml").read_text())["teacher"]["model"] == "../large/model"
    assert not (chain.build("large") / "results.json").exists(), "it is measured by a run of its own"
    results = json.loads((chain.build("small") / "results.json").read_text())
    large = json.loads((chain.build("large") / "plan.json").read_text())
    assert results["models"]["teacher"]["parameters"] == large["student"]["parameters"]

    for name, path in (("plan", "plan.json"), ("verification", "verification.json"), ("eval", "results.json")):
        conforms(name, json.loads((chain.build("small") / path).read_text()))
    for line in (chain.build("small") / "train" / "metrics.jsonl").read_text().splitlines():
        conforms("step", json.loads(line))
    for command, options, what in (("show", [], "builds/small"), ("diff", ["builds/large"], "builds/small")):
        code, out, err = chain(command, *(str(chain.folder / one) for one in options), "--json", spec=what)
        assert code == 0, err
        conforms(command, json.loads(out))
    assert json.loads(out)["results"] is None and json.loads(out)["selection"]
    code, out, _ = chain("lock", "--json")
    conforms("lock", json.loads(out))
    assert json.loads(out)["changed"] is False

    before = {path: path.stat().st_mtime_ns for path in chain.folder.rglob("*.safetensors")}
    code, _, err = chain("run")
    assert code == 0 and "is finished and becomes the teacher, skipped" in err and "is up to date with" in err
    assert {path: path.stat().st_mtime_ns for path in before} == before

    (chain.folder / "large.yaml").write_text(LARGE.replace("tokens: 512", "tokens: 1024"))
    code, out, err = chain("plan", "--detailed-exitcode", "--json", "--device", "h200x8")
    assert code == 3 and "is compiled from other inputs: teacher sha256 is built from" in err
    assert "large is compiled from another version of the spec" in json.loads(out)["remarks"][0]
    conforms("plan", json.loads(out))
    code, _, err = chain("plan", "--locked")
    assert code == 2 and "small.lock.yaml:" in err and "teacher sha256: is locked at" in err
    assert "`minitron lock small.yaml` renews it" in err
    code, out, _ = chain("compile", "--json")
    conforms("errors", json.loads(out))
    (error,) = json.loads(out)["errors"]
    assert code == 2 and error["message"].endswith(
        "large is compiled from another version of the spec, which differs in `distill` only"
    )
    assert error["hint"].startswith("`minitron run large.yaml` first")
