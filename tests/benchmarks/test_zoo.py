"""The benchmark's verdicts: on a student of our own, on what can go wrong with one, and on processes that do not end well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.load import load_benchmark
from tests.foundry import Foundry

Made = tuple[dict[str, Any], Any]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    return load_benchmark("zoo")


@pytest.fixture(scope="module")
def folder(zoo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and the request."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo.prepare(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def made(zoo: ModuleType, folder: Path, foundry: Foundry) -> Made:
    """The shapes that were asked for, and what became of the student, as the benchmark's processes leave it."""
    from zoo_tools import run_step

    with foundry.shortened():
        assert run_step(zoo.OURS, folder, zoo.OURS) == 0
    assert run_step("reload", folder, zoo.OURS) == 0
    return json.loads((folder / "request.json").read_text())["expected"], zoo.read_outcome(folder, zoo.OURS)


def test_ours_is_as_asked(zoo: ModuleType, made: Made) -> None:
    expected, outcome = made
    assert zoo.classify(expected, outcome) == ("as asked", "")
    assert expected["model.layers.0.self_attn.q_proj.weight"] == [4 * 8, 32]
    assert expected["model.layers.0.self_attn.k_proj.weight"] == [2 * 8, 32], "key-value groups stay"
    assert expected["model.layers.0.mlp.down_proj.weight"] == [32, 20]


def test_a_tensor_that_is_larger_than_asked_for(zoo: ModuleType, made: Made) -> None:
    expected, outcome = made
    narrower = expected | {"model.layers.1.mlp.up_proj.weight": [10, 32]}
    verdict, detail = zoo.classify(narrower, outcome)
    assert verdict == "under-pruned"
    assert detail == f"1 of {len(expected)} tensors, model.layers.1.mlp.up_proj.weight is [20, 32] and not [10, 32]"


def test_what_is_wrong_on_reload(zoo: ModuleType, made: Made) -> None:
    expected, outcome = made
    slightly = replace(outcome, reloaded=outcome.reloaded + 1e-4 * outcome.reloaded.abs().max())
    assert zoo.classify(expected, slightly) == ("wrong on reload", "logits differ by 1.0e-04 of the largest")
    rounding = replace(outcome, reloaded=outcome.reloaded + 1e-6 * outcome.reloaded.abs().max())
    assert zoo.classify(expected, rounding)[0] == "as asked"
    no_number = replace(outcome, reloaded=outcome.reloaded * float("nan"))
    missing = replace(outcome, problems=("lm_head.weight",))
    not_loaded = zoo.Outcome("ValueError: sizes")
    for one in (no_number, missing, not_loaded):
        assert zoo.classify(expected, one)[0] == "wrong on reload"


def test_a_request_that_the_plan_refuses(zoo: ModuleType, folder: Path, foundry: Foundry, tmp_path: Path) -> None:
    from zoo_tools import run_step

    request = json.loads((folder / "request.json").read_text())
    request["widths"]["head_dim"] = 4
    (tmp_path / "request.json").write_text(json.dumps(request))
    (tmp_path / "teacher").symlink_to(folder / "teacher")
    (tmp_path / "corpus.txt").symlink_to(folder / "corpus.txt")
    with foundry.shortened():
        assert run_step(zoo.OURS, tmp_path, zoo.OURS) == 1
    verdict, detail = zoo.classify(request["expected"], zoo.read_outcome(tmp_path, zoo.OURS))
    assert verdict == "refused" and "student.head_dim: cannot be narrowed: " in detail


@pytest.mark.parametrize(
    ("script", "detail"), [("sleep 60", "no end after 0 s"), ("echo first; echo killed >&2; exit 137", "killed")]
)
def test_a_process_that_does_not_end_well(zoo: ModuleType, tmp_path: Path, script: str, detail: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    assert zoo.classify({}, zoo.attempt(tmp_path, zoo.PEER, str(python), 0.4)) == ("crashed", detail)


def test_the_table_has_a_note_for_each_reason_once(zoo: ModuleType) -> None:
    ours = [zoo.Row("a", "as asked"), zoo.Row("b", "refused", "no such axis")]
    peer = [zoo.Row("a", "crashed", "KeyError"), zoo.Row("b", "crashed", "KeyError")]
    assert zoo.render({"ours": ours, "theirs": peer}).splitlines() == [
        "| family | ours | theirs |",
        "|---|---|---|",
        "| a | as asked | crashed<sup>1</sup> |",
        "| b | refused<sup>2</sup> | crashed<sup>1</sup> |",
        "",
        "- ours: of 2 families 1 as asked, 1 refused",
        "- theirs: of 2 families 2 crashed",
        "",
        "1. KeyError",
        "2. no such axis",
    ]
