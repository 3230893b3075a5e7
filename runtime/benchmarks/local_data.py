"""Local copies of benchmark data in place of the Hub: the harness's own task, configured to read other files.

For a task T the folder holds `T.jsonl`, the documents to evaluate on, and, where the task takes its few-shot examples
from another split, `T.train.jsonl`; without the latter the examples come from `T.jsonl`, the question itself left out.
For a group G one file `G.jsonl` may hold the rows of all its tasks, told apart by their `subject`. Rows have the fields
of the task's data set on the Hub, or one of the plain forms that are often passed around (see `_FORMS`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.runtime.benchmarks.catalogue import Document, Found, subset
from minitron.specs.errors import UsageError, WorkError

Row = dict[str, Any]

_OTHER_NAMES = {
    "arc_challenge": "arc",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
}
"""The names that a file may have besides the name of its task."""

_MBPP_TEST = range(11, 511)
"""The `task_id` of the test split, by the data set's card; the rest are prompts, validation and training."""

_MBPP_PROMPT = range(1, 11)

_SUBJECT = "subject"
"""The field that tells the tasks of a group apart."""


def local_file(folder: Path, name: str, split: str = "") -> Path | None:
    """Finds the file of a task or group; None where there is none."""
    names = [name, *([_OTHER_NAMES[name]] if name in _OTHER_NAMES else [])]
    found = (folder / f"{one}{split}.jsonl" for one in names)
    return next((path for path in found if path.is_file()), None)


def check_local_data(folder: Path, suite: Sequence[Found]) -> None:
    """Checks that a suite's files are there. UsageError with everything that is missing."""
    if not folder.is_dir():
        raise UsageError(f"evaluate.data_dir: there is no folder {folder}; write where the tasks' data is, or null")
    missing = [one.benchmark.task for one in suite if any(True for _ in _absent(folder, one))]
    if missing:
        files = ", ".join(f"{task}.jsonl" for task in missing)
        raise UsageError(
            f"evaluate.data_dir: {folder} has no data for {', '.join(missing)}; put {files} there, leave these tasks out, "
            "or write null for data_dir: then all of it comes from the Hub"
        )


def _absent(folder: Path, found: Found) -> Iterator[str]:
    """Yields the tasks of a benchmark that have no file."""
    if not any(local_file(folder, group.name) for group in found.groups):
        yield from (task for task in found.tasks if local_file(folder, task) is None)


def data_hash(folder: Path, found: Found) -> str:
    """Returns the hash of the files that a benchmark reads."""
    digest = hashlib.sha256()
    names = [*found.tasks, *(group.name for group in found.groups)]
    files = {local_file(folder, name, split) for name in names for split in ("", ".train")}
    for path in sorted(path for path in files if path is not None):
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


@dataclass
class LocalData:
    """Writes the data that tasks read into `target`, from the files in `folder`."""

    folder: Path
    target: Path
    _subjects: dict[Path, dict[str, list[tuple[int, Row]]]] = field(default_factory=dict)
    """The rows of each group's file by subject; the file of a group with many tasks is read once."""

    def place(self, found: Found, task: str, *, shots: int) -> Document:
        """Writes a task's data and returns the keys of the task's file that name the data. WorkError where the data do
        not fit the task.
        """
        data = {"test": self._written(found, task, "")}
        if any(local_file(self.folder, name, ".train") for name in _names(found, task)):
            data["train"] = self._written(found, task, ".train")
        document: Document = {
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": "train" if "train" in data else None,
            "validation_split": None,
            "test_split": "test",
            # Where both are the same split the harness leaves the question itself out of its examples.
            "fewshot_split": "train" if "train" in data else "test",
        }
        if task == "mbpp" and shots:
            data["prompt"] = self._written(found, task, "", "prompt")
        return document | {"dataset_kwargs": {"data_files": data, "cache_dir": str(self.target / "cache")}}

    def _written(self, found: Found, task: str, split: str, form: str = "") -> str:
        source = next(
            path for name in _names(found, task) if (path := local_file(self.folder, name, split)) is not None
        )
        path = self.target / f"{task}{split}{form}.jsonl"
        convert = _FORMS.get(f"{task}{form}", _as_it_is)
        with path.open("w", encoding="utf-8") as file:
            count = 0
            for number, row in self._rows(source, task):
                try:
                    rows = list(convert(row))
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise WorkError(
                        f"{source}:{number}: is not a row of {task} ({type(error).__name__}: {error}); write the rows that its "
                        "data set on the Hub has"
                    ) from None
                for one in rows:
                    file.write(json.dumps(one) + "\n")
                    count += 1
        if not count:
            what = f"row of {task}'s {form or 'test'} split"
            raise WorkError(f"{source}: has no {what}; write the rows that its data set on the Hub has")
        return str(path)

    def _rows(self, source: Path, task: str) -> Iterator[tuple[int, Row]]:
        if source in (local_file(self.folder, task), local_file(self.folder, task, ".train")):
            yield from _lines(source)
            return
        if source not in self._subjects:
            subjects = self._subjects.setdefault(source, {})
            for number, row in _lines(source):
                if not isinstance(row.get(_SUBJECT), str):
                    raise WorkError(
                        f"{source}:{number}: has no `{_SUBJECT}`, which tells the tasks of a group apart; add it"
                    )
                subjects.setdefault(row[_SUBJECT], []).append((number, row))
        yield from self._subjects[source].get(subset(task) or task, [])


def _names(found: Found, task: str) -> list[str]:
    """Returns the names that the file of a task may have: the name of the task itself, or of a group that contains the
    task.
    """
    return [task, *(group.name for group in found.groups)]


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
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
    except (ValueError, RecursionError) as error:
        raise WorkError(f"{path}: is not JSON Lines ({error}); each line must hold one JSON object") from None


def _as_it_is(row: Row) -> Iterator[Row]:
    yield row


def _arc(row: Row) -> Iterator[Row]:
    """Converts a row to `choices` as a list of texts and `answer` as the number of the right one."""
    if isinstance(row["choices"], dict):
        yield row
        return
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    answer = labels[row["answer"]]
    yield {
        "question": row["question"], "choices": {"text": row["choices"], "label": labels}, "answerKey": answer,
    }  # fmt: skip


def _truthfulqa(row: Row) -> Iterator[Row]:
    """Converts the columns of the authors' TruthfulQA.csv, with answers separated by `;`."""
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
    """Yields a row of the test split, in a file that holds the whole data set: the test split is the one that
    counts.
    """
    if row.get("task_id", _MBPP_TEST.start) in _MBPP_TEST:
        yield row


def _mbpp_prompt(row: Row) -> Iterator[Row]:
    if row.get("task_id") in _MBPP_PROMPT:
        yield row


_FORMS: Mapping[str, Callable[[Row], Iterator[Row]]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "truthfulqa_mc1": _truthfulqa,
    "truthfulqa_mc2": _truthfulqa,
    "mbpp": _mbpp,
    "mbppprompt": _mbpp_prompt,
}
