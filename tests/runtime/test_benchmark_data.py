"""Benchmark data from a folder: which file is whose, and that its rows become those of the harness's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron.runtime.benchmarks.catalogue import Found, Group
from minitron.runtime.benchmarks.local_data import LocalData, check_local_data, data_hash
from minitron.specs.blocks.benchmarks import Benchmark
from minitron.specs.errors import UsageError, WorkError

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


def of(task: str) -> Found:
    return Found(Benchmark(task=task), (task,))


def placed(folder: Path, found: Found, task: str, shots: int = 0) -> dict[str, Any]:
    """The keys of a task's file that name its data."""
    target = folder / "made"
    target.mkdir(exist_ok=True)
    return LocalData(folder, target).place(found, task, shots=shots)


def rows_of(document: dict[str, Any], split: str = "test") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(document["dataset_kwargs"]["data_files"][split]).read_text().splitlines()]


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def written(folder: Path, task: str, *rows: dict[str, Any], name: str = "") -> list[dict[str, Any]]:
    """The rows that the harness reads for a task, from a file `name` (the task's own name if left out)."""
    write(folder, name or task, *rows)
    return rows_of(placed(folder, of(task), task))


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
    for name in ("gsm8k", "gsm8k.train"):
        write(tmp_path, name, {"question": name, "answer": "#### 1"})
    document = placed(tmp_path, of("gsm8k"), "gsm8k")
    assert document["fewshot_split"] == document["training_split"] == "train"
    assert rows_of(document, "train")[0]["question"] == "gsm8k.train"


def test_without_one_they_come_from_the_split_that_is_asked_about(tmp_path: Path) -> None:
    """And by that the harness knows to leave the question itself out."""
    write(tmp_path, "gsm8k", {"question": "?", "answer": "#### 1"})
    document = placed(tmp_path, of("gsm8k"), "gsm8k")
    assert document["fewshot_split"] == document["test_split"] == "test" and document["training_split"] is None


def test_the_examples_of_mbpp_are_those_of_its_prompt_split(tmp_path: Path) -> None:
    write(tmp_path, "mbpp", *({"task_id": number} for number in (1, 2, 3, 4, 10, 11, 600)))
    assert "prompt" not in placed(tmp_path, of("mbpp"), "mbpp")["dataset_kwargs"]["data_files"]
    document = placed(tmp_path, of("mbpp"), "mbpp", shots=3)
    assert [row["task_id"] for row in rows_of(document, "prompt")] == [1, 2, 3, 4, 10]


GROUP = Found(Benchmark(task="pair"), ("one", "two"), (Group("pair", Path("pair.yaml")),))


def test_a_group_has_a_file_for_each_task_or_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.runtime.benchmarks.local_data.subset", {"one": "First", "two": None}.get)
    with pytest.raises(UsageError, match=r"has no data for pair; put pair\.jsonl there"):
        check_local_data(tmp_path, [GROUP])
    write(tmp_path, "pair", {"subject": "First", "n": 1}, {"subject": "two", "n": 2}, {"subject": "First", "n": 3})
    check_local_data(tmp_path, [GROUP])
    assert [row["n"] for row in rows_of(placed(tmp_path, GROUP, "one"))] == [1, 3]
    assert [row["n"] for row in rows_of(placed(tmp_path, GROUP, "two"))] == [2]
    write(tmp_path, "two", {"n": 4})
    assert [row["n"] for row in rows_of(placed(tmp_path, GROUP, "two"))] == [4]


def test_rows_of_a_group_say_whose_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.runtime.benchmarks.local_data.subset", lambda task: task)
    write(tmp_path, "pair", {"n": 1})
    with pytest.raises(WorkError, match=r"pair\.jsonl:1: has no `subject`, which tells the tasks of a group apart"):
        placed(tmp_path, GROUP, "one")
    write(tmp_path, "pair", {"subject": "one"})
    with pytest.raises(WorkError, match=r"pair\.jsonl: has no row of two's test split"):
        placed(tmp_path, GROUP, "two")


def test_other_data_is_known_by_its_hash(tmp_path: Path) -> None:
    write(tmp_path, "pair", {"subject": "one"})
    before = data_hash(tmp_path, GROUP)
    write(tmp_path, "pair.train", {"subject": "one"})
    assert before != data_hash(tmp_path, GROUP)
    (tmp_path / "pair.train.jsonl").unlink()
    assert before == data_hash(tmp_path, GROUP)


def test_everything_that_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "arc.jsonl").touch()
    with pytest.raises(UsageError, match=r"has no data for gsm8k, arc_easy; put gsm8k\.jsonl, arc_easy\.jsonl there"):
        check_local_data(tmp_path, [of("gsm8k"), of("arc_challenge"), of("arc_easy")])


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
    with pytest.raises(WorkError, match=message):
        placed(tmp_path, of("arc_challenge"), "arc_challenge")


@pytest.mark.shared
def test_the_shared_copies_are_understood(tmp_path: Path) -> None:
    if not BENCHMARKS.is_dir():
        pytest.skip("needs ../shared/data/benchmarks")
    counts = {
        "arc_challenge": 1172, "gsm8k": 1319, "hellaswag": 1000, "humaneval": 164, "mbpp": 500, "truthfulqa_mc2": 817,
        "winogrande": 1267,
    }  # fmt: skip
    check_local_data(BENCHMARKS, [of(task) for task in counts])
    data = LocalData(BENCHMARKS, tmp_path)
    for task, count in counts.items():
        assert len(rows_of(data.place(of(task), task, shots=0))) == count
