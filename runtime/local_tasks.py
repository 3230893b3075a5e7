"""Local copies of benchmark data in place of the Hub: the harness's own task, told to read other files.

For a task T the folder holds `T.jsonl`, what it is evaluated on, and where the task shows examples that come from another
split `T.train.jsonl`; without that one the examples come from the same file, the question itself left out. Rows have the
fields of the task's data set on the Hub, or one of the plain forms that are often passed around (see `_FORMS`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minitron.specs.errors import UsageError, WorkError

Row = dict[str, Any]

_OTHER_NAMES = {
    "arc_challenge": "arc",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
}
"""What a file may be called beside the name of its task."""

_MBPP_TEST = range(11, 511)
"""`task_id` of the test split, by the data set's card; the rest are prompts, validation and training."""


def local_file(folder: Path, task: str, split: str = "") -> Path | None:
    """The file of a task, None where there is none."""
    names = [task, *([_OTHER_NAMES[task]] if task in _OTHER_NAMES else [])]
    found = (folder / f"{name}{split}.jsonl" for name in names)
    return next((path for path in found if path.is_file()), None)


def check_local_data(folder: Path, tasks: Sequence[str]) -> None:
    """UsageError with everything that is not there."""
    if not folder.is_dir():
        raise UsageError(f"evaluate.data_dir: there is no folder {folder}; write where the tasks' data is, or null")
    if missing := [task for task in tasks if local_file(folder, task) is None]:
        files = ", ".join(f"{task}.jsonl" for task in missing)
        raise UsageError(
            f"evaluate.data_dir: {folder} has no data for {', '.join(missing)}; put {files} there, leave these tasks out, "
            "or write null for data_dir: then all of it comes from the Hub"
        )


def write_tasks(folder: Path, tasks: Mapping[str, Path], target: Path) -> None:
    """Writes to `target` a task of the same name for each of `tasks`, which includes the harness's own (its YAML file) and
    replaces where the data comes from. WorkError for data that is not that of the task."""
    for task, own in tasks.items():
        data = {"test": _written(folder, task, "", target)}
        if local_file(folder, task, ".train") is not None:
            data["train"] = _written(folder, task, ".train", target)
        document: dict[str, Any] = {
            "include": str(own),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data, "cache_dir": str(target / "cache")},
            "training_split": "train" if "train" in data else None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": "train" if "train" in data else None,
        }
        (target / f"{task}.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def _written(folder: Path, task: str, split: str, target: Path) -> str:
    source = local_file(folder, task, split)
    assert source is not None
    path = target / f"{task}{split}.jsonl"
    form = _FORMS.get(task, _as_it_is)
    with path.open("w", encoding="utf-8") as file:
        count = 0
        for number, row in _rows(source):
            try:
                rows = list(form(row))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise WorkError(
                    f"{source}:{number}: is not a row of {task} ({type(error).__name__}: {error}); write the rows that its "
                    "data set on the Hub has"
                ) from None
            for one in rows:
                file.write(json.dumps(one) + "\n")
                count += 1
    if not count:
        raise WorkError(f"{source}: has no row of {task}'s test split; write the rows that its data set on the Hub has")
    return str(path)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                    yield number, row
    except OSError as error:
        raise WorkError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise WorkError(f"{path}: is not JSON Lines ({error}); each line must hold one JSON object") from None


def _as_it_is(row: Row) -> Iterator[Row]:
    yield row


def _arc(row: Row) -> Iterator[Row]:
    """`choices` as a list of texts and `answer` as the number of the right one."""
    if isinstance(row["choices"], dict):
        yield row
        return
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    answer = labels[row["answer"]]
    yield {
        "question": row["question"], "choices": {"text": row["choices"], "label": labels}, "answerKey": answer,
    }  # fmt: skip


def _truthfulqa(row: Row) -> Iterator[Row]:
    """The columns of the authors' TruthfulQA.csv, answers separated by `;`."""
    if "mc1_targets" in row or "mc2_targets" in row:
        yield row
        return
    right, wrong = (
        [answer.strip() for answer in row[f"{name} Answers"].split(";") if answer.strip()]
        for name in ("Correct", "Incorrect")
    )
    yield {
        "question": row["Question"],
        "mc1_targets": {"choices": [row["Best Answer"], *wrong], "labels": [1] + [0] * len(wrong)},
        "mc2_targets": {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)},
    }


def _mbpp(row: Row) -> Iterator[Row]:
    """The whole data set in one file: its test split is what counts."""
    if row.get("task_id", _MBPP_TEST.start) in _MBPP_TEST:
        yield row


_FORMS: Mapping[str, Callable[[Row], Iterator[Row]]] = {
    "arc_challenge": _arc,
    "truthfulqa_mc1": _truthfulqa,
    "truthfulqa_mc2": _truthfulqa,
    "mbpp": _mbpp,
}
