"""Benchmark data from a folder: which file is whose, and that its rows become those of the harness's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from minitron.runtime.local_tasks import check_local_data, write_tasks
from minitron.runtime.models import LanguageModel, load_tokenizer
from minitron.runtime.suite import check_suite, run_suite
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.training_plan import EvaluatePlan, HeadPlan
from tests.runtime import tiny

BENCHMARKS = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"

PLAIN_ARC = {"question": "why?", "choices": ["a", "b", "c", "d"], "answer": 2}
HUB_ARC = {
    "question": "why?",
    "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
}
CSV_TRUTHFUL = {
    "Question": "Is it?", "Best Answer": "It is", "Correct Answers": "It is; Surely", "Incorrect Answers": "No; Never; ",
}  # fmt: skip


def written(folder: Path, task: str, *rows: dict[str, Any], name: str = "") -> list[dict[str, Any]]:
    """The rows that the harness reads for a task, from a file `name` (the task's own name if left out)."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name or task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    target = folder / "made"
    target.mkdir(exist_ok=True)
    write_tasks(folder, {task: Path("/harness/own.yaml")}, target)
    document = yaml.safe_load((target / f"{task}.yaml").read_text())
    assert (document["include"], document["task"], document["dataset_path"]) == ("/harness/own.yaml", task, "json")
    return [
        json.loads(line) for line in Path(document["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    ]


def test_rows_of_the_hub_stay_as_they_are(tmp_path: Path) -> None:
    row = {"sentence": "the _ sat", "option1": "cat", "option2": "mat", "answer": "1"}
    assert written(tmp_path, "winogrande", row) == [row]
    assert written(tmp_path, "arc_challenge", HUB_ARC) == [HUB_ARC]


def test_plain_forms_become_rows_of_the_hub(tmp_path: Path) -> None:
    assert written(tmp_path, "arc_challenge", PLAIN_ARC, name="arc") == [HUB_ARC]
    (row,) = written(tmp_path, "truthfulqa_mc2", CSV_TRUTHFUL, name="truthfulqa")
    assert row["mc2_targets"] == {"choices": ["It is", "Surely", "No", "Never"], "labels": [1, 1, 0, 0]}
    assert row["mc1_targets"] == {"choices": ["It is", "No", "Never"], "labels": [1, 0, 0]}
    rows = [{"task_id": number, "text": "", "code": "", "test_list": []} for number in (2, 11, 510, 511)]
    assert [row["task_id"] for row in written(tmp_path, "mbpp", *rows)] == [11, 510]


def test_examples_come_from_a_file_of_their_own_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for name in ("gsm8k", "gsm8k.train"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "#### 1"}))
    write_tasks(tmp_path, {"gsm8k": Path("own.yaml")}, tmp_path / "made")
    document = yaml.safe_load((tmp_path / "made" / "gsm8k.yaml").read_text())
    assert document["fewshot_split"] == document["training_split"] == "train"
    assert "gsm8k.train" in Path(document["dataset_kwargs"]["data_files"]["train"]).read_text()


def test_everything_that_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "arc.jsonl").touch()
    with pytest.raises(UsageError, match=r"has no data for gsm8k, arc_easy; put gsm8k\.jsonl, arc_easy\.jsonl there"):
        check_local_data(tmp_path, ["gsm8k", "arc_challenge", "arc_easy"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"arc_challenge\.jsonl: is not JSON Lines"),
        ("[1]", r"arc_challenge\.jsonl: is not JSON Lines \(not an object\)"),
        ('{"question": "?"}', r"arc_challenge\.jsonl:1: is not a row of arc_challenge \(KeyError: 'choices'\)"),
        (json.dumps(PLAIN_ARC | {"answer": 7}), r"arc_challenge\.jsonl:1: is not a row of arc_challenge \(IndexError"),
        ("", r"arc_challenge\.jsonl: has no row of arc_challenge"),
    ],
)
def test_data_that_is_not_the_tasks(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "arc_challenge.jsonl").write_text(line)
    (tmp_path / "made").mkdir()
    with pytest.raises(WorkError, match=message):
        write_tasks(tmp_path, {"arc_challenge": Path("own.yaml")}, tmp_path / "made")


@pytest.mark.shared
def test_the_shared_copies_are_understood(tmp_path: Path) -> None:
    if not BENCHMARKS.is_dir():
        pytest.skip("needs ../shared/data/benchmarks")
    counts = {
        "arc_challenge": 1172, "gsm8k": 1319, "hellaswag": 1000, "humaneval": 164, "mbpp": 500, "truthfulqa_mc2": 817,
        "winogrande": 1267,
    }  # fmt: skip
    check_local_data(BENCHMARKS, list(counts))
    write_tasks(BENCHMARKS, dict.fromkeys(counts, Path("own.yaml")), tmp_path)
    for task, count in counts.items():
        assert len((tmp_path / f"{task}.jsonl").read_text().splitlines()) == count


def test_the_harness_itself_runs_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network; where lm-eval is installed."""
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    data.mkdir()
    (data / "arc.jsonl").write_text("\n".join(json.dumps(PLAIN_ARC | {"question": f"why {n}?"}) for n in range(6)))
    (data / "truthfulqa.jsonl").write_text("\n".join(json.dumps(CSV_TRUTHFUL) for _ in range(3)))
    tiny.save_tokenizer(tmp_path / "tokenizer", bos=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.llama(16))
    plan = EvaluatePlan(suite=("arc_challenge", "truthfulqa_mc2"), data_dir="data", prompt=None, continuation_tokens=1)
    check_suite(plan, tmp_path)
    wrapped = LanguageModel(model, HeadPlan.model_validate(tiny.HEAD))
    found = run_suite(wrapped, load_tokenizer(tmp_path / "tokenizer"), plan, tmp_path, 2)
    assert set(found) == {"arc_challenge", "truthfulqa_mc2"}
    assert all(0 <= figure["value"] <= 1 for figure in found.values())
