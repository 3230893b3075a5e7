"""The GitHub Action: its files against their schemas, and its scripts, run on a repository with a pull request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import models

from .conftest import ROOT, Repository

SCRIPTS = ROOT / ".github" / "specs"
ACTION = ROOT / "action.yml"
WORKFLOW = ROOT / "examples" / "repository" / ".github" / "workflows" / "specs.yml"

SPEC = "teacher: {model: ../teacher, dtype: float32}\nstudent:\n  layers: {drop: [1]}\n"
# Plays GitHub: comments are in a file, and so is every call.
GH = """\
import json, os, re, sys
from pathlib import Path
state = Path(os.environ["GH_STATE"])
comments = json.loads(state.read_text()) if state.exists() else []
arguments = sys.argv[1:]
assert arguments.pop(0) == "api" and os.environ["GH_TOKEN"] == "secret"
if os.environ.get("GH_REFUSES") in arguments or (os.environ.get("GH_REFUSES") == "GET" and "--jq" in arguments):
    sys.exit("HTTP 403")
option = lambda name: arguments[arguments.index(name) + 1] if name in arguments else None
if option("--method"):
    body = Path(option("-F").removeprefix("body=@")).read_text()
    path = next(one for one in arguments if one.startswith("repos/"))
    if option("--method") == "PATCH":
        one = next(one for one in comments if path == f"repos/org/specs/issues/comments/{one['id']}")
        one["body"] = body
    else:
        assert option("--method") == "POST" and path == "repos/org/specs/issues/7/comments"
        comments.append({"id": 100 + len(comments), "body": body})
    state.write_text(json.dumps(comments))
else:
    marker = re.search(r'startswith\\("([^"]*)"\\)', option("--jq"))[1]
    print("\\n".join(str(one["id"]) for one in comments if one["body"].startswith(marker)))
"""


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
    scripts = set(re.findall(r"\$GITHUB_ACTION_PATH/\.github/specs/(\w+\.sh)", text))
    assert scripts == {"report.sh", "comment.sh"}
    for path in SCRIPTS.iterdir():
        assert path.stat().st_mode & 0o111, path
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    # What a pull request's author writes (branch names, titles) never becomes part of a script.
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_the_workflow_may_do_what_the_action_does() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    checkout, action = workflow["jobs"]["specs"]["steps"]
    assert checkout["with"]["fetch-depth"] == 0
    assert set(action.get("with", {})) <= set(yaml.safe_load(ACTION.read_text())["inputs"])


# -- the scripts --------------------------------------------------------------------------------------------------------


class PullRequest:
    """A repository with a base and changes on a branch, and GitHub's side of it."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.repository = Repository(folder / "specs", programs, folder)
        self.folder = folder
        self.base = ""

    def report(self, **more: str) -> subprocess.CompletedProcess[str]:
        temporary = self.folder / "runner"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return self.repository.run(
            SCRIPTS / "report.sh",
            **{"BASE": self.base, "SPECS": ":(glob)specs/**/*.yaml", "RUNNER_TEMP": str(temporary)},
            **{"GITHUB_OUTPUT": str(temporary / "output"), "GITHUB_STEP_SUMMARY": str(temporary / "summary"), **more},
        )

    @property
    def outputs(self) -> dict[str, str]:
        lines = (self.folder / "runner" / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def text(self) -> str:
        return Path(self.outputs["report"]).read_text()

    def comment(self, **more: str) -> subprocess.CompletedProcess[str]:
        outputs = self.outputs
        return self.repository.run(
            SCRIPTS / "comment.sh",
            **{"REPORT": outputs["report"], "CHANGED": outputs["changed"], "PULL_REQUEST": "7", "GH_TOKEN": "secret"},
            **{"GITHUB_REPOSITORY": "org/specs", "GH_STATE": str(self.folder / "comments.json"), **more},
        )

    @property
    def comments(self) -> list[dict[str, Any]]:
        path = self.folder / "comments.json"
        return list(json.loads(path.read_text())) if path.exists() else []


@pytest.fixture(scope="session")
def with_gh(programs: Path) -> Path:
    program = programs / "gh"
    program.write_text(f"#!{sys.executable}\n{GH}")
    program.chmod(0o755)
    return programs


@pytest.fixture
def pull_request(tmp_path: Path, with_gh: Path) -> PullRequest:
    """The base has a teacher's configuration, two specs and a lock."""
    request = PullRequest(tmp_path, with_gh)
    repository = request.repository
    config = models.tiny_config("llama", num_hidden_layers=2)
    repository.write("teacher/config.json", config.to_json_string())
    repository.write("specs/changed one.yaml", SPEC + "name: one\n")
    repository.write("specs/left.yaml", SPEC)
    repository.write("specs/left.lock.yaml", "format_version: 1\nspec: left.yaml\n")
    request.base = repository.commit("base")
    repository.git("checkout", "--quiet", "-b", "branch")
    return request


def test_changed_specs_and_those_of_changed_locks(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    repository.write("specs/changed one.yaml", SPEC + "name: two\n")
    repository.write("specs/deep/new.yaml", SPEC)
    repository.write("specs/left.lock.yaml", "format_version: 1\nspec: left.yaml\nversions: {}\n")
    repository.write("other.yaml", "no: spec\n")
    repository.git("rm", "--quiet", "--cached", "teacher/config.json")
    repository.commit("change")
    done = repository.run(SCRIPTS / "changed.sh", pull_request.base, ":(glob)specs/**/*.yaml")
    assert done.stdout.split("\0") == ["specs/changed one.yaml", "specs/deep/new.yaml", "specs/left.yaml", ""]


def test_specs_that_build_on_a_changed_one_count_as_changed(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    repository.write("specs/base/one.yaml", SPEC)
    repository.write("specs/wider.yaml", "extends: base/one.yaml   # the same, wider\n")
    repository.write("specs/deep/small.yaml", 'teacher:\n  spec: "../wider.yaml"\n')
    repository.write("specs/deep/smaller.yaml", "teacher: {spec: small.yaml, dtype: float32}\n")
    pull_request.base = repository.commit("base")
    repository.write("specs/base/one.yaml", SPEC + "name: one\n")
    repository.commit("change")
    done = repository.run(SCRIPTS / "changed.sh", pull_request.base, ":(glob)specs/**/*.yaml")
    found = ["specs/base/one.yaml", "specs/deep/small.yaml", "specs/deep/smaller.yaml", "specs/wider.yaml", ""]
    assert done.stdout.split("\0") == found, done.stderr


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
    assert text in (pull_request.folder / "runner" / "summary").read_text()
    assert repository.git("worktree", "list").count("\n") == 0, "what was checked out for the base is gone"


def test_wrong_specs_are_reported_and_fail(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    repository.write("specs/changed one.yaml", SPEC.replace("layers:", "layer:"))
    repository.write("specs/new.yaml", SPEC.replace("teacher:", "teacher:\n  ~~~~~~ :"))
    repository.commit("change")
    done = pull_request.report(PLAN="false")
    assert done.returncode == 1 and "specs/changed one.yaml:3:3: student.layer" in done.stderr
    assert "**There are mistakes in the specs.**" in pull_request.text
    assert pull_request.text.count("\n~~~~~~\n") == 1, "what stands in a spec does not end the block"


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
