"""The GitHub Action: its files against their schemas, and its scripts, run on a repository with a pull request."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT
from .pull_requests import SCRIPTS, SPEC, PullRequest, pull_request, with_gh

__all__ = ["pull_request", "with_gh"]

ACTION = ROOT / "action.yml"
WORKFLOW = ROOT / "examples" / "repository" / ".github" / "workflows" / "specs.yml"


# -- the files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-actions", ACTION),
        ("vendor.github-workflows", WORKFLOW),
        ("vendor.github-workflows", ROOT / ".github" / "workflows" / "ci.yml"),
    ],
)
def test_github_takes_the_files(schema: str, file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_inputs_and_scripts_of_the_action_are_there() -> None:
    text = ACTION.read_text()
    action = yaml.safe_load(text)
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"]), "each is declared, and each is used"
    scripts = set(re.findall(r"\$GITHUB_ACTION_PATH/\.github/specs/(\w+\.py)", text))
    assert scripts == {path.name for path in SCRIPTS.glob("*.py")}
    # What a pull request's author writes (branch names, titles) never becomes part of a script.
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        # Nor does a module that lies in its checkout (`pip.py`) run in place of an installed one.
        assert "python" not in step.get("run", "").replace("python -P", "")


def test_the_workflow_may_do_what_the_action_does() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    checkout, action = workflow["jobs"]["specs"]["steps"]
    assert checkout["with"]["fetch-depth"] == 0
    assert set(action.get("with", {})) <= set(yaml.safe_load(ACTION.read_text())["inputs"])


# -- the scripts --------------------------------------------------------------------------------------------------------


def changed(pull_request: PullRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs that the script counts as changed."""
    loader = importlib.util.spec_from_file_location("report", SCRIPTS / "report.py")
    assert loader is not None and loader.loader is not None
    report = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(report)
    monkeypatch.chdir(pull_request.repository.folder)
    with report.work_tree(pull_request.folder / "head", "HEAD") as after:
        return list(report.changed(after, pull_request.base, ":(glob)specs/**/*.yaml"))


def test_changed_specs_and_those_of_changed_locks(pull_request: PullRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = pull_request.repository
    repository.write("specs/changed one.yaml", SPEC + "name: two\n")
    repository.write("specs/deep/new.yaml", SPEC)
    repository.write("specs/left.lock.yaml", "format_version: 1\nspec: left.yaml\nversions: {}\n")
    repository.write("other.yaml", "no: spec\n")
    repository.commit("change")
    assert changed(pull_request, monkeypatch) == ["specs/changed one.yaml", "specs/deep/new.yaml", "specs/left.yaml"]


def test_specs_that_build_on_a_changed_file_count_as_changed(
    pull_request: PullRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the reference is written: the language's own reader finds it, as it does in a compile."""
    repository = pull_request.repository
    repository.write("shared/one.yaml", SPEC)
    repository.write("specs/wider.yaml", "extends: ../shared/one.yaml   # the same, wider\n")
    repository.write("specs/braces.yaml", "{extends: ../shared/one.yaml, name: braces}\n")
    repository.write("specs/quoted.yaml", '"extends": "../shared/\\x6fne.yaml"\n')
    repository.write("specs/folded.yaml", "extends: >-\n  ../shared/one.yaml\n")
    repository.write("specs/alias.yaml", "name: &it ../shared/one.yaml\n? extends\n: *it\n")
    repository.write("specs/deep/small.yaml", 'teacher:\n  "spec": ../wider.yaml\n')
    repository.write("specs/deep/smaller.yaml", "teacher: {spec: small.yaml, dtype: float32}\n")
    repository.write("specs/words.yaml", SPEC.replace("../teacher", "org/model") + "# extends: ../shared/one.yaml\n")
    pull_request.base = repository.commit("base")
    repository.write("shared/one.yaml", SPEC + "name: one\n")
    repository.commit("change")
    names = ("alias", "braces", "deep/small", "deep/smaller", "folded", "quoted", "wider")
    assert changed(pull_request, monkeypatch) == [f"specs/{name}.yaml" for name in names]


def test_a_changed_configuration_changes_the_specs_of_its_teacher(
    pull_request: PullRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = pull_request.repository
    repository.write("specs/other.yaml", SPEC.replace("../teacher", "org/teacher"))
    pull_request.base = repository.commit("base")
    repository.write("teacher/generation_config.json", "{}")
    repository.commit("change")
    assert changed(pull_request, monkeypatch) == ["specs/changed one.yaml", "specs/left.yaml"]


def test_a_good_change_is_planned_and_compared(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    repository.write("specs/changed one.yaml", SPEC.replace("drop: [1]", "drop: [0]") + "name: one\n")
    repository.commit("change")
    done = pull_request.report(DEVICE="h200x8")
    assert done.returncode == 0, done.stderr
    text = pull_request.text
    assert "fits h200x8" in text
    assert text.startswith("<!-- minitron specs -->\n**1 spec changed, all valid.**\n")
    assert "## `specs/changed one.yaml`" in text
    assert "| student.layers.drop | [1] | [0] |" in text
    assert re.search(r"\| num_hidden_layers \| 2 \| 1 \| 50\.0% \|", text)
    assert str(repository.folder) not in text and "specs/left.yaml" not in text
    assert text in (pull_request.folder / "_runner" / "summary").read_text()
    assert repository.git("worktree", "list").count("\n") == 0, "what was checked out for the base is gone"


def test_wrong_specs_are_reported_and_fail(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    repository.write("specs/changed one.yaml", SPEC.replace("layers:", "layer:"))
    repository.write("specs/new.yaml", SPEC.replace("teacher:", "teacher:\n  ~~~~~~ :"))
    repository.commit("change")
    done = pull_request.report(PLAN="false")
    assert done.returncode == 1 and "specs/changed one.yaml:3:3: student.layer" in done.stderr
    assert "**There are mistakes in the specs.**" in pull_request.text
    lines = pull_request.text.splitlines()
    assert all(not line or line.startswith("    ") for line in lines[2:]), "what stands in a spec stays in the block"


def test_one_comment_a_pull_request_written_over(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    repository.write("specs/new.yaml", SPEC)
    repository.commit("change")
    assert pull_request.report(PLAN="false").returncode == 0
    assert pull_request.comment().returncode == 0 and pull_request.comment().returncode == 0
    ((one),) = pull_request.comments
    assert "1 spec changed" in one["body"]
    # What is no longer so is not left standing; and where nothing was ever said, nothing is.
    repository.git("rm", "--quiet", "specs/new.yaml")
    repository.commit("back")
    assert pull_request.report().returncode == 0 and pull_request.outputs["changed"] == "0"
    assert pull_request.comment().returncode == 0
    assert [one["body"] for one in pull_request.comments] == [
        "<!-- minitron specs -->\nNo spec differs from the base.\n"
    ]
    (pull_request.folder / "comments.json").unlink()
    assert pull_request.comment().returncode == 0 and pull_request.comments == []


@pytest.mark.parametrize("refuses", ["GET", "POST"])
def test_a_fork_without_rights_is_a_warning(pull_request: PullRequest, refuses: str) -> None:
    pull_request.repository.write("specs/new.yaml", SPEC)
    pull_request.repository.commit("change")
    pull_request.report(PLAN="false")
    done = pull_request.comment(GH_REFUSES=refuses)
    assert done.returncode == 0 and "::warning::" in done.stdout and pull_request.comments == []


def test_a_report_that_is_too_long_is_cut(pull_request: PullRequest) -> None:
    pull_request.repository.write("specs/new.yaml", SPEC)
    pull_request.repository.commit("change")
    pull_request.report(PLAN="false")
    with Path(pull_request.outputs["report"]).open("a") as report:
        report.write("ä" * 70_000)
    assert pull_request.comment().returncode == 0
    (one,) = pull_request.comments
    assert len(one["body"]) < 65_536 and "longer than a comment can be" in one["body"]


@pytest.mark.parametrize(("base", "words"), [("", "There is no base"), ("0" * 40, "fetch-depth: 0")])
def test_without_a_base_it_says_what_to_do(pull_request: PullRequest, base: str, words: str) -> None:
    pull_request.base = base
    done = pull_request.report()
    assert done.returncode == 2 and words in done.stderr
