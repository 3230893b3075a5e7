"""A repository with a pull request, GitHub's side of it, and the scripts of the action run on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import models

from .conftest import ROOT, Repository

SCRIPTS = ROOT / ".github" / "specs"
BOT = "github-actions[bot]"
SPEC = "teacher: {model: ../teacher, dtype: float32}\nstudent:\n  layers: {drop: [1]}\n"
# Plays GitHub: comments are in a file, and so is every call.
GH = """\
import json, os, sys
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
        comments.append({"id": 100 + len(comments), "author": "github-actions[bot]", "body": body})
    state.write_text(json.dumps(comments))
else:
    assert option("--jq") == ".[] | {id, body, author: .user.login}"
    print("\\n".join(json.dumps(one) for one in comments))
"""


class PullRequest:
    """A repository with a base and changes on a branch, and GitHub's side of it."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.repository = Repository(folder / "specs", programs, folder)
        self.folder = folder
        self.base = ""

    def report(self, **more: str) -> subprocess.CompletedProcess[str]:
        temporary = self.folder / "_runner"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        environment = {
            "BASE": self.base,
            "SPECS": ":(glob)specs/**/*.yaml",
            "RUNNER_TEMP": str(temporary),
            "GITHUB_OUTPUT": str(temporary / "output"),
            "GITHUB_STEP_SUMMARY": str(temporary / "summary"),
        }
        return self.repository.run(sys.executable, "-P", SCRIPTS / "report.py", **environment | more)

    @property
    def outputs(self) -> dict[str, str]:
        lines = (self.folder / "_runner" / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def text(self) -> str:
        return Path(self.outputs["report"]).read_text()

    def comment(self, **more: str) -> subprocess.CompletedProcess[str]:
        outputs = self.outputs
        environment = {
            "REPORT": outputs["report"],
            "CHANGED": outputs["changed"],
            "AUTHOR": BOT,
            "PULL_REQUEST": "7",
            "GH_TOKEN": "secret",
            "GITHUB_REPOSITORY": "org/specs",
            "GH_STATE": str(self.folder / "comments.json"),
        }
        return self.repository.run(sys.executable, "-P", SCRIPTS / "comment.py", **environment | more)

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
