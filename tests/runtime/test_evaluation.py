"""`evaluate`: the models of a build side by side, in the keys of the contract."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from minitron.runtime import evaluate, suite, train
from minitron.runtime.evaluate import recovered
from minitron.runtime.models import weight_bytes
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.progress import Silent
from minitron.specs.training_plan import EvaluationPlan
from tests.runtime import tiny


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
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'minitron\[eval\]'"):
        run(build, evaluate__suite=["hellaswag"])


def fake_harness(monkeypatch: pytest.MonkeyPatch, simple_evaluate: Any, folder: Path = Path("/harness")) -> None:
    """The harness's interface as version 0.4 has it; the tasks themselves are its own affair."""
    harness = SimpleNamespace(HFLM=lambda **given: SimpleNamespace(**given))
    tasks = ["arc_challenge", "hellaswag", "mmlu"]
    index = {task: SimpleNamespace(yaml_path=str(folder / f"{task}.yaml")) for task in tasks}
    manager = SimpleNamespace(all_tasks=tasks, all_subtasks=tasks[:-1], task_index=index)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace(huggingface=harness))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", harness)

    def make(include_path: str | None = None) -> Any:
        return SimpleNamespace(**vars(manager), include_path=include_path)

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=make))


def never(**_: Any) -> Any:
    raise AssertionError("nothing must be run")


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("helaswag", None, r"lm-eval has no task `helaswag`; did you mean `hellaswag`\?"),
        ("mmlu", "bench", r"`mmlu` is a group of tasks, .* name the tasks themselves"),
        ("hellaswag", "nowhere", r"evaluate\.data_dir: there is no folder .*nowhere"),
        ("hellaswag", "bench", r"bench has no data for hellaswag; put hellaswag\.jsonl there"),
    ],
)
def test_a_suite_that_cannot_be_run_is_refused_before_anything_begins(
    build: Path, monkeypatch: pytest.MonkeyPatch, task: str, data: str | None, message: str
) -> None:
    fake_harness(monkeypatch, never)
    (build / "bench").mkdir()
    with pytest.raises(UsageError, match=message):
        run(build, evaluate__suite=[task], evaluate__data_dir=data)


def test_programs_of_models_are_run_only_where_that_is_allowed(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.yaml").write_text("output_type: generate_until\nunsafe_code: true\n")
    (tmp_path / "hellaswag.yaml").write_text("task: hellaswag\ninclude: base.yaml\n")
    allowed: list[bool] = []

    def simple_evaluate(*, confirm_run_unsafe_code: bool, **_: Any) -> dict[str, Any]:
        allowed.append(confirm_run_unsafe_code)
        return {"results": {}}

    fake_harness(monkeypatch, simple_evaluate, tmp_path)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(
        UsageError, match="`hellaswag` runs the programs that the models write; set HF_ALLOW_CODE_EVAL=1"
    ):
        run(build, evaluate__suite=["hellaswag"])
    assert not allowed
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    run(build, evaluate__suite=["hellaswag"])
    assert allowed == [True, True]


def test_a_suite_is_run_by_lm_eval(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def simple_evaluate(*, model: Any, tasks: list[str], **_: Any) -> dict[str, Any]:
        asked.append((type(model.pretrained).__name__, tasks))
        figures = {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}
        return {"results": {"hellaswag": figures | {"acc_norm_stderr,none": 0.2}}}

    fake_harness(monkeypatch, simple_evaluate)
    results = run(build, evaluate__suite=["hellaswag"])
    assert results["models"]["pruned"]["tasks"] == {"hellaswag": {"metric": "acc_norm", "value": 0.5, "stderr": 0.2}}
    assert asked == [("LlamaForCausalLM", ["hellaswag"])] * 2


def test_the_figure_that_a_task_is_quoted_by() -> None:
    assert suite.main_figure({"alias": "x", "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"}) == {
        "metric": "exact_match",
        "value": 0.5,
        "stderr": None,
    }
    assert suite.main_figure({"alias": "a group"})["value"] is None


def test_a_student_that_is_gone(build: Path) -> None:
    shutil.rmtree(build / "student")
    with pytest.raises(WorkError, match=r"there is no folder .*student, where the tokenizer should be; compile again"):
        run(build)
