"""`evaluate`: the models of a build side by side, in the keys of the contract."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.runtime import evaluate, measured_model, train
from minitron.runtime.benchmarks.catalogue import _manager
from minitron.runtime.benchmarks.suite import main_figure
from minitron.runtime.evaluate import recovered
from minitron.runtime.models import open_model, weight_bytes
from minitron.runtime.requirements import judge
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.progress import Silent
from minitron.specs.training_plan import EvaluationPlan
from tests.runtime import tiny
from tests.runtime.listening import Figures


def run(build: Path, **changes: Any) -> dict[str, Any]:
    if changes:
        tiny.write_plan(build, **changes)
    return evaluate(build, device="cpu", progress=Silent())


def test_three_models_side_by_side(build: Path) -> None:
    train(build, device="cpu", progress=Silent())
    results = run(build)
    assert results["format_version"] == 1 and list(results["models"]) == ["teacher", "pruned", "distilled"]
    for measured in results["models"].values():
        assert measured["weight_bytes"] == 4 * measured["parameters"]
        assert measured["held_out"]["tokens"] > 200 and measured["tokens_per_second"] > 0
        assert measured["tasks"] == {} and isinstance(measured["continuation"], str)
    assert json.loads((build / "results.json").read_text()) == results
    last = [json.loads(line) for line in (build / "train" / "metrics.jsonl").read_text().splitlines()][-1]
    assert results["models"]["distilled"]["held_out"]["loss"] == pytest.approx(last["held_out_loss"])


def test_before_training_there_are_two(build: Path) -> None:
    results = run(build)
    assert list(results["models"]) == ["teacher", "pruned"] and results["recovered"] is None


def test_a_loss_is_shown_beside_its_own_measurement_only(build: Path) -> None:
    heard = Figures("evaluate")
    results = evaluate(build, device="cpu", progress=heard)
    shown = [(one["model"], one["held_out_loss"]) for one in heard.seen if one["held_out_loss"] is not None]
    assert shown == [(name, model["held_out"]["loss"]) for name, model in results["models"].items()]
    assert all("held_out_loss" in one for one in heard.seen), "a figure stays until it is replaced or removed"


def test_a_build_that_does_not_train(build: Path) -> None:
    document = {k: v for k, v in tiny.plan().items() if k in EvaluationPlan.model_fields}
    (build / "training.yaml").write_text(yaml.safe_dump(document))
    assert run(build)["models"]["pruned"]["held_out"]["tokens"] > 200


def test_without_held_out_text_there_is_still_a_size_and_a_speed(build: Path) -> None:
    results = run(build, held_out=None)
    pruned = results["models"]["pruned"]
    assert results["prompt"] is None and pruned["held_out"] is None and pruned["continuation"] is None
    assert pruned["parameters"] > 0 and pruned["tokens_per_second"] > 0


def test_a_prompt_is_continued_by_each(build: Path) -> None:
    results = run(build, evaluate__prompt="the cat sat on", evaluate__continuation_tokens=5)
    assert results["prompt"] == "the cat sat on"
    assert results["models"]["teacher"]["continuation"] != results["models"]["pruned"]["continuation"]
    assert run(build)["models"]["pruned"]["continuation"] == results["models"]["pruned"]["continuation"], "it is greedy"


def test_the_text_is_seen_as_the_plan_says(build: Path) -> None:
    assert run(build, held_out__max_tokens=100)["models"]["teacher"]["held_out"]["tokens"] < 100


def test_a_prompt_longer_than_the_model_reads(build: Path) -> None:
    results = run(build, evaluate__prompt="the cat sat on a mat and " * 40, evaluate__continuation_tokens=5)
    assert results["models"]["teacher"]["continuation"] and results["models"]["pruned"]["tokens_per_second"] > 0


def held_out(**losses: float) -> dict[str, Any]:
    return {name: {"held_out": {"loss": loss}} for name, loss in losses.items()}


def test_what_was_won_back() -> None:
    assert recovered(held_out(teacher=2.0, pruned=4.0, distilled=2.5)) == pytest.approx(0.75)
    assert recovered(held_out(teacher=2.0, pruned=4.0, distilled=4.5)) == pytest.approx(-0.25)
    assert recovered(held_out(teacher=2.0, pruned=4.0)) is None
    assert recovered(held_out(teacher=2.0, pruned=2.0, distilled=2.0)) is None
    assert recovered({"teacher": {"held_out": None}, "pruned": {"held_out": None}}) is None


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    tiny.save_model(tiny.llama(16, tied=True), tmp_path / "tied", seed=0)
    tiny.save_model(tiny.llama(16), tmp_path / "untied", seed=0)
    assert weight_bytes(tmp_path / "untied") - weight_bytes(tmp_path / "tied") == 4 * 320 * 16


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00not json"])
def test_a_weight_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WorkError, match="is not a whole safetensors file"):
        weight_bytes(tmp_path)


def test_a_suite_without_lm_eval(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'minitron\[eval\]'"):
        run(build, evaluate__suite=["hellaswag"])


def test_the_figure_that_a_task_is_quoted_by() -> None:
    figures = {"alias": "x", "exact_match,strict": 0.5, "exact_match,flexible": 0.7, "exact_match_stderr,strict": "N/A"}
    assert main_figure(figures) == {"metric": "exact_match", "value": 0.5, "stderr": None}
    assert main_figure({"acc,none": 0.1, "acc_norm,none": 0.2})["value"] == 0.2
    assert main_figure({"acc,none": 0.1, "acc_stderr,none": 0.3, "acc_norm,none": 0.2}, "acc") == {
        "metric": "acc",
        "value": 0.1,
        "stderr": 0.3,
    }
    assert main_figure({"alias": "a group"})["value"] is None


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the models that are opened from now on."""
    opened: list[str] = []

    def open_one(folder: Path, *given: Any) -> Any:
        opened.append(folder.name)
        return open_model(folder, *given)

    monkeypatch.setattr(measured_model, "open_model", open_one)
    return opened


def test_what_was_measured_is_not_measured_again(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(build)
    opened = count_openings(monkeypatch)
    assert run(build) == first and opened == []
    with_prompt = run(build, evaluate__prompt="the cat sat on")
    assert (
        opened == ["teacher", "student"]
        and with_prompt["models"]["pruned"]["held_out"] == first["models"]["pruned"]["held_out"]
    )
    opened.clear()
    run(build)
    assert opened == [], "what was known before another prompt was tried is still known"


def test_another_model_or_text_is_measured(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(build)
    opened = count_openings(monkeypatch)
    tiny.save_model(tiny.llama(16), build / "student", seed=7)
    tiny.verify(build)
    other = run(build)
    assert opened == ["student"] and other["models"]["pruned"] != first["models"]["pruned"]
    opened.clear()
    (build.parent / "valid.txt").write_text(tiny.text(20, seed=9), encoding="utf-8")
    assert run(build)["models"]["teacher"]["held_out"] != first["models"]["teacher"]["held_out"]
    assert opened == ["teacher", "student"]


@pytest.mark.parametrize(
    "content", ["", "[", "[]", '{"format": 1, "files": {}, "measurements": {"a": 1}}', '{"format": 0}']
)
def test_broken_measurements_are_made_again(build: Path, content: str) -> None:
    first = run(build)
    (build / "measurements.json").write_text(content)
    again = run(build)
    for name, model in first["models"].items():
        assert again["models"][name]["held_out"] == model["held_out"]


def test_a_build_that_cannot_be_written_is_refused_before_anything_is_measured(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        WorkError, match="results could not be written: the disk is full; make room and run the command again"
    ):
        run(build)
    assert opened == [] and not (build / "results.json").exists()
    assert not list(build.glob(".*results*"))


def test_a_read_only_build_is_refused_too(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(
        WorkError, match=r"results could not be written: .*Read-only file system: '.*/results.json'; see that it can be"
    ):
        run(build)


def test_requirements_are_judged(build: Path) -> None:
    require = {"held_out_loss": "<= 0.5x teacher", "recovered": ">= 0.5"}
    loss, recovery = run(build, evaluate__require=require)["requirements"]
    assert (loss["name"], loss["model"], loss["ok"]) == ("held_out_loss", "pruned", False)
    assert loss["short_by"] == pytest.approx(loss["value"] - loss["limit"]) and loss["short_by"] > 0
    assert recovery["ok"] is False and recovery["value"] is None, "nothing was distilled"


@pytest.mark.parametrize(
    ("bound", "short"),
    [
        (">= 0.95x teacher", 0.95 * 0.8 - 0.7), ("<= 1.05x teacher", 0.0), (">= 0.6", 0.0), ("<= 0.5", 0.2),
        (">= 1.2x pruned", 0.0), (">=0.7", 0.0),
    ],
)  # fmt: skip
def test_bounds(bound: str, short: float) -> None:
    models = {
        name: {"tasks": {"mmlu": {"value": value}}}
        for name, value in (("teacher", 0.8), ("pruned", 0.4), ("distilled", 0.7))
    }
    (judged,) = judge({"mmlu": bound}, models, None)
    assert judged["short_by"] == pytest.approx(short) and judged["ok"] == (short == 0)


def test_a_student_that_is_gone(build: Path) -> None:
    shutil.rmtree(build / "student")
    with pytest.raises(WorkError, match=r"there is no folder .*student, where the tokenizer should be; compile again"):
        run(build)
