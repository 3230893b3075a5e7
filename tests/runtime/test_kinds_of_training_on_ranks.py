"""Hidden states, samples and a corrected teacher on two ranks, the student spread over both: the same as on one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from minitron.runtime import record
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.processes import train_on_ranks
from tests.runtime.test_training import run, weights
from tests.runtime.tiny import read_metrics

KINDS: dict[str, dict[str, Any]] = {
    "hidden states": {"loss__hidden_states": {"pairs": [[1, 1], [0, 0]]}},
    "moments of 8 bits": {"optimizer__states": "int8"},
    "muon": {"optimizer__name": "muon"},
    "samples": {"teacher_logits": {"sampled": 6}},
    "a corrected teacher": {
        "teacher_correction": {
            "tokens": 64 * 4, "optimizer": {"lr": 3e-3, "warmup_steps": 1}, "every_tokens": 64 * 2, "output": "teacher",
            "work": "train/teacher",
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_the_same(build: Path, tmp_path: Path, kind: str) -> None:
    tiny.write_plan(build, **KINDS[kind], tokens=64 * 6)
    if kind == "samples":
        record(build, device="cpu", progress=Silent())
    shutil.copytree(tmp_path / "here", tmp_path / "one")
    one = run(tmp_path / "one" / "build")
    assert train_on_ranks(build, 2) == ["done", "done"]
    two = read_metrics(build / "train" / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5)
    assert weights(build).keys() == weights(tmp_path / "one" / "build").keys()
    if kind == "a corrected teacher":
        paths = [
            folder / "build" / "train" / "teacher" / "metrics.jsonl" for folder in (tmp_path / "one", build.parent)
        ]
        alone, spread = ([line["loss"] for line in read_metrics(path)] for path in paths)
        assert len(alone) == 4 and spread == pytest.approx(alone, rel=1e-5)
