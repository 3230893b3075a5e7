"""A build's documents change together or not at all, and never contradict what was trained or edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.compiler.teacher.freshness import staleness, why_stale
from minitron.specs import LoadedSpec
from minitron.specs.builds import begun_identity
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.file_hashes import folder_hashes
from minitron.specs.hand_edits import differences, hand_edits
from minitron.specs.progress import Silent
from minitron.specs.training_plan import deciding_settings
from tests.foundry import Foundry

STUDENT = {"intermediate_size": 24}
LR = 1e-3


def blocks(foundry: Foundry, lr: float = LR, tokens: int = 4096, **evaluate: Any) -> dict[str, Any]:
    data = {"text": [str(foundry.root / "corpus.txt")], "document": "line"}
    return {
        "distill": {
            "data": data,
            "tokens": tokens,
            "sequence_length": 32,
            "global_batch_size": 4,
            "optimizer": {"lr": lr, "warmup_steps": 2},
        },
        "evaluate": {"continuation_tokens": 4} | evaluate,
    }


@pytest.fixture
def load(foundry: Foundry) -> Callable[..., LoadedSpec]:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    return lambda student=STUDENT, **changes: foundry.load(teacher, student, **blocks(foundry, **changes))


@pytest.fixture
def build(foundry: Foundry, load: Callable[..., LoadedSpec], tmp_path: Path) -> Path:
    made = foundry.build(foundry.teacher("llama", num_hidden_layers=2), STUDENT, program=False, **blocks(foundry))
    shutil.copytree(made.folder, tmp_path / "build")
    return tmp_path / "build"


def contents(build: Path) -> dict[str, bytes]:
    """Every file but the lock, which says who was there last."""
    files = (path for path in build.rglob("*") if path.is_file() and path.name != ".minitron.lock")
    return {str(path.relative_to(build)): path.read_bytes() for path in files}


def begin_training(build: Path) -> None:
    """What a finished training leaves, as far as a compile looks at it."""
    from minitron.runtime.plan import read_training_plan

    identity = deciding_settings(read_training_plan(build).training()) | {"data": "hash"}
    (build / "train").mkdir()
    (build / "train" / "finished.json").write_text(json.dumps({"identity": identity}))
    assert begun_identity(build) == json.loads(json.dumps(identity))


def edit(build: Path, old: str, new: str) -> None:
    path = build / "training.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


class Named(Silent):
    """Keeps the names of the work that was shown."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        self.names.append(name)
        return super().task(name, total, unit, done)


def test_another_rate_for_a_trained_build_is_refused_before_anything_is_written(
    foundry: Foundry, load: Callable[..., LoadedSpec], build: Path
) -> None:
    begin_training(build)
    before, progress = contents(build), Named()
    with pytest.raises(SpecInvalid) as refused:
        foundry.compile(load(lr=2e-3, tokens=8192), build, progress, program=False)
    assert [one.path for one in refused.value.errors] == ["distill.optimizer.lr", "distill.tokens"] or [
        one.path for one in refused.value.errors
    ] == ["distill.tokens", "distill.optimizer.lr"]
    words = str(refused.value)
    assert f"was 0.001 when the training in {build} began, and is now 0.002; write 0.001 again" in words
    assert "--fresh" in words and all(error.line for error in refused.value.errors)
    assert contents(build) == before and progress.names == []


def test_another_width_for_a_trained_build_is_refused_before_anything_is_written(
    foundry: Foundry, load: Callable[..., LoadedSpec], build: Path
) -> None:
    begin_training(build)
    before, progress = contents(build), Named()
    with pytest.raises(UsageError, match=r"holds the training of another student \(other widths\).*--fresh"):
        foundry.compile(load({"intermediate_size": 32}), build, progress, program=False)
    assert contents(build) == before and progress.names == []


@pytest.mark.parametrize("trained", [True, False])
def test_a_change_of_what_is_measured_neither_compiles_nor_verifies(
    foundry: Foundry, load: Callable[..., LoadedSpec], build: Path, trained: bool
) -> None:
    if trained:
        begin_training(build)
    loaded, before, progress = load(prompt="the cat"), contents(build), Named()
    found = staleness(build, loaded)
    assert found is not None and not found.student and found.reason.endswith("which differs in `evaluate` only")
    foundry.compile(loaded, build, progress, program=False)
    now = contents(build)
    assert {name for name in now if now[name] != before.get(name)} == {"plan.json", "training.yaml"}
    assert yaml.safe_load(now["training.yaml"])["evaluate"]["prompt"] == "the cat"
    assert json.loads(now["plan.json"])["selection"] == json.loads(before["plan.json"])["selection"]
    assert progress.names == [] and why_stale(build, loaded) is None


def test_another_rate_before_the_training_renews_its_plan(
    foundry: Foundry, load: Callable[..., LoadedSpec], build: Path
) -> None:
    student = folder_hashes(build / "student")
    foundry.compile(loaded := load(lr=2e-3), build, program=False)
    assert yaml.safe_load((build / "training.yaml").read_text())["optimizer"]["lr"] == 2e-3
    assert folder_hashes(build / "student") == student and why_stale(build, loaded) is None


def test_a_hand_edit_is_seen_and_kept(foundry: Foundry, load: Callable[..., LoadedSpec], build: Path) -> None:
    edit(build, "lr: 0.001\n", "lr: 0.003\n")
    loaded = load()
    found = staleness(build, loaded)
    assert found is not None and not found.changed and not found.student
    assert found.reason == "edited by hand: training.yaml has optimizer.lr 0.001 -> 0.003"
    before = contents(build)
    with pytest.raises(UsageError, match=r"edited by hand \(optimizer.lr 0.001 -> 0.003\).*remove training.yaml"):
        foundry.compile(load(prompt="the cat"), build, program=False)
    assert contents(build) == before
    # What the spec says as well is no longer an edit.
    foundry.compile(same := load(lr=3e-3, prompt="the cat"), build, program=False)
    assert why_stale(build, same) is None


def test_comments_are_no_edit_and_a_file_that_is_gone_is_written_again(
    foundry: Foundry, load: Callable[..., LoadedSpec], build: Path
) -> None:
    edit(build, "optimizer:\n", "# tried 2e-3 as well\noptimizer:\n")
    assert why_stale(build, load()) is None
    (build / "training.yaml").unlink()
    assert why_stale(build, load()) == "not compiled to its end"
    progress = Named()
    foundry.compile(load(), build, progress, program=False)
    assert progress.names == [] and why_stale(build, load()) is None


def test_a_compile_that_fails_leaves_the_build_as_it_was(
    foundry: Foundry, load: Callable[..., LoadedSpec], build: Path
) -> None:
    from dataclasses import replace

    from tests.foundry import WITHOUT_PROGRAM

    def full(*_: Any) -> None:
        raise WorkError("the disk is full")

    before = contents(build)
    with pytest.raises(WorkError, match="the disk is full"):
        foundry.compile(load({"intermediate_size": 32}), build, stages=replace(WITHOUT_PROGRAM, write_program=full))
    now = contents(build)
    assert {name for name in now if now[name] != before.get(name)} <= {"scores.safetensors"}
    assert now.keys() == before.keys()


def test_what_is_no_yaml_is_an_edit_too(build: Path) -> None:
    (build / "training.yaml").write_text("lr: [")
    plan = json.loads((build / "plan.json").read_text())
    assert [edit.path for edit in hand_edits(build, plan)] == ["training.yaml"]


def test_differences_are_named_value_by_value() -> None:
    found = differences({"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 0})
    assert [str(one) for one in found] == ["a.b 1 -> 2", "e nothing -> 0"]
