"""What is read from a build folder, whole, unfinished or broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron.cli import builds
from minitron.specs.errors import UsageError, WorkError


def test_what_is_not_a_build_is_refused_with_what_to_give(tmp_path: Path, build: Path) -> None:
    assert builds.require_build(build) == build
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("nowhere", "no such build folder; `minitron compile SPEC -o "),
        ("empty", "not a build folder, it has neither plan.json nor training.yaml"),
        ("file", "a file, not a build folder"),
    ):
        with pytest.raises(UsageError, match=message):
            builds.require_build(tmp_path / name)


def test_a_folder_with_a_training_plan_alone_can_be_trained(tmp_path: Path) -> None:
    (tmp_path / "training.yaml").write_text("tokens: 1\n")
    assert builds.require_build(tmp_path) == tmp_path


def test_progress_is_the_first_and_the_last_record(build: Path) -> None:
    progress = builds.training_progress(build)
    assert progress is not None
    assert progress["total_tokens"] == 3_000_000
    assert (progress["first"]["step"], progress["last"]["step"], progress["steps"]) == (1, 3, 3)


def test_a_line_that_a_killed_process_left_unfinished_is_passed_over(build: Path) -> None:
    with (build / "train" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "tok')
    progress = builds.training_progress(build)
    assert progress is not None and progress["last"]["step"] == 3


def test_no_metrics_no_progress_and_a_broken_training_plan_has_no_total(build: Path) -> None:
    (build / "training.yaml").write_text("a: [")
    progress = builds.training_progress(build)
    assert progress is not None and progress["total_tokens"] is None
    (build / "train" / "metrics.jsonl").unlink()
    assert builds.training_progress(build) is None


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_document_is_named(build: Path, content: str) -> None:
    (build / "plan.json").write_text(content)
    with pytest.raises(WorkError, match=r"plan\.json: not a JSON (document|object)"):
        builds.show_document(build)


def test_show_has_null_for_what_is_not_there_yet(build: Path) -> None:
    (build / "results.json").unlink()
    content = builds.show_document(build)
    assert list(content) == ["build", "plan", "training", "verification", "results"]
    assert content["results"] is None and content["plan"]["spec"]["name"] == "tiny"
