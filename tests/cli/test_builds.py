"""What is read from a build folder, whole, unfinished or broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron.cli import builds
from minitron.cli.build_sections import build_sections
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.locks import only_one


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
    assert list(content) == ["build", "plan", "edited", "training", "verification", "results"]
    assert content["results"] is None and content["plan"]["spec"]["name"] == "tiny"


def test_a_build_is_moved_aside_and_nothing_is_deleted(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {str(path.relative_to(build)) for path in build.rglob("*")}
    (build.parent / "build.1").mkdir()
    builds.move_aside(build)
    aside = build.parent / "build.2"
    assert not build.exists() and files <= {str(path.relative_to(aside)) for path in aside.rglob("*")}
    assert f"moved to {aside}" in capsys.readouterr().err
    builds.move_aside(build)  # there is none any more


def test_a_build_at_work_is_not_moved(build: Path) -> None:
    with only_one(build / "train", "training"), pytest.raises(UsageError, match="another process is training"):
        builds.move_aside(build)
    assert build.exists()


def test_edits_by_hand_are_shown(build: Path) -> None:
    plan = json.loads((build / "plan.json").read_text())
    (build / "plan.json").write_text(json.dumps(plan | {"training": {"format_version": 1, "tokens": 4_000_000}}))
    content = builds.show_document(build)
    assert content["edited"] == [{"path": "tokens", "generated": 4_000_000, "written": 3_000_000}]
    section = next(one for one in build_sections(content) if one.title == "Edited by hand")
    assert section.rows == (("tokens", "4000000", "3000000"),)
