"""Pull requests of strangers, and the action that reports on them: what it opens, and what becomes of what it shows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.repository.conftest import programs
from tests.repository.pull_requests import BOT, SPEC, PullRequest, pull_request, with_gh

__all__ = ["programs", "pull_request", "with_gh"]

SECRET = "only-the-runner-knows-this"


@pytest.fixture
def runner(pull_request: PullRequest) -> PullRequest:
    """Files of the runner that are no business of a pull request: beside the checkout, in it, and git's own."""
    folder = pull_request.repository.folder
    for path in (folder.parent / "secret.yaml", folder / "credentials.yaml", folder / ".git" / "secret.yaml"):
        path.write_text(f"{SECRET}: 1\n{SECRET}\n")
    (folder.parent / "model").mkdir()
    (folder.parent / "model" / "config.json").write_text(json.dumps({"model_type": SECRET}))
    (folder / ".git" / "info" / "exclude").write_text("credentials.yaml\n")
    return pull_request


def report(pull_request: PullRequest, name: str, text: str, **more: str) -> str:
    """Everything that a pull request with one more spec gets to show: report, log, comment."""
    pull_request.repository.write(name, text)
    pull_request.repository.commit("change")
    done = pull_request.report(**more)
    assert done.returncode == 1, done.stderr
    return pull_request.text + done.stdout + done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "extends: ../../secret.yaml\n",
        "extends: {outside}/secret.yaml\n",
        "extends: ../.git/secret.yaml\n",
        "extends: /proc/self/environ\n",
        "{{extends: &a ../../secret.yaml, name: x}}\n",
        "extends: shared.yaml\n",
        "teacher: {{spec: ../../secret.yaml}}\nstudent: {{layers: {{drop: [1]}}}}\n",
        "teacher: {{model: ../../model}}\nstudent: {{layers: {{drop: [1]}}}}\n",
        "teacher: {{model: {outside}/model}}\nstudent: {{layers: {{drop: [1]}}}}\n",
        SPEC.replace("{", "{{").replace("}", "}}") + "importance: {{data: {{text: [../../*.yaml]}}}}\n",
        SPEC.replace("{", "{{").replace("}", "}}") + "evaluate: {{data_dir: ../..}}\n",
        SPEC.replace("{", "{{").replace("}", "}}")
        + "distill: {{tokens: 1K, data: {{blend: [{{weight: 1, jsonl: /etc/passwd}}]}}}}\n",
    ],
)
def test_nothing_outside_the_repository_is_opened(runner: PullRequest, text: str) -> None:
    outside = runner.repository.folder.parent
    runner.repository.write("specs/shared.yaml", f"extends: {outside}/secret.yaml\n")
    shown = report(runner, "specs/new.yaml", text.format(outside=outside))
    assert "leads out of the repository" in shown
    assert SECRET not in shown and "specs/" in shown


@pytest.mark.parametrize(
    "target", ["../../secret.yaml", "../credentials.yaml", "../.git/secret.yaml", "/proc/self/environ"]
)
def test_links_that_lead_out_are_not_there(runner: PullRequest, target: str) -> None:
    """Nor is a file that lies in the checkout and is not committed: an earlier step may have left its credentials."""
    folder = runner.repository.folder
    (folder / "specs" / "link.yaml").symlink_to(target)
    (folder / "specs" / "link-to-link.yaml").symlink_to("link.yaml")
    (folder / "model").symlink_to(folder.parent / "model")
    runner.repository.write("specs/data.yaml", SPEC.replace("../teacher", "../model"))
    planned = "true" if target.endswith("environ") else "false"  # the model's link is the same in all cases
    shown = report(runner, "specs/new.yaml", "extends: link-to-link.yaml\n", PLAN=planned)
    assert SECRET not in shown and "HOME=" not in shown
    assert "specs/new.yaml:1:10: extends: `link-to-link.yaml`: there is no such file" in shown


def test_links_inside_the_repository_are_followed(pull_request: PullRequest) -> None:
    (pull_request.repository.folder / "specs" / "link.yaml").symlink_to("left.yaml")
    (pull_request.repository.folder / "teachers").symlink_to("teacher")
    pull_request.repository.write("specs/new.yaml", SPEC.replace("../teacher", "../teachers"))
    pull_request.repository.commit("change")
    assert pull_request.report().returncode == 0, pull_request.text
    assert pull_request.text.count("\n## ") == 2


def outside_of_code(text: str) -> list[str]:
    """The lines of a report that are read as markdown."""
    return [line for line in text.splitlines() if not line.startswith("    ")]


@pytest.mark.parametrize(
    "text",
    [
        '"x\\n~~~~~~\\n\\n[link](https://example.com) @somebody": 1\n',
        '"x\\r\\r[link](https://example.com) @somebody": 1\n',
        '"x\\u2028\\u2028[link](https://example.com) @somebody": 1\n',
        '"x\\n   ~~~~~~\\n@somebody": 1\n"x\\n::error::owned": 2\n',
        'teacher: {spec: "x\\n\\n@somebody"}\n',
    ],
)
def test_keys_and_values_stay_in_their_block(pull_request: PullRequest, text: str) -> None:
    report(pull_request, "specs/new.yaml", text)
    outside = "\n".join(outside_of_code(pull_request.text))
    assert "somebody" not in outside and "example.com" not in outside and "~~~" not in outside


@pytest.mark.parametrize(
    "name", ["specs/::error::owned.yaml", "::stop-commands::x/new.yaml", "specs/##[error]owned.yaml"]
)
def test_no_line_of_the_log_is_a_command_to_the_runner(pull_request: PullRequest, name: str) -> None:
    """The runner obeys lines that begin with `::` and, anywhere in a line, the older `##[`."""
    text = '"a\\n::error::owned": 1\n"##[error]owned": 2\n"b\\r::stop-commands::x": 3\n'
    pull_request.repository.write(name, text)
    pull_request.repository.commit("change")
    done = pull_request.report(SPECS=":(glob)**/*.yaml")
    lines = re.split(r"[\r\n]", done.stdout + done.stderr)
    assert any("owned" in line for line in lines)
    assert not [line for line in lines if line.strip().startswith("::") or "##[" in line]


def test_names_of_models_and_files_are_text(pull_request: PullRequest) -> None:
    repository = pull_request.repository
    folder = "teacher [x](https://example.com) @somebody #1 <b> www.example.com"
    source = repository.folder / "teacher" / "config.json"
    repository.write(f"{folder}/config.json", source.read_text())
    name = "specs/`@somebody` **x** <img>.yaml"
    repository.write(name, SPEC.replace("../teacher", f'"../{folder}"') + "name: new\n")
    repository.commit("change")
    done = pull_request.report()
    assert done.returncode == 0, pull_request.text + done.stderr
    text = pull_request.text
    assert "## `specs/'@somebody' **x** <img>.yaml`" in text, "in code nothing is a mention"
    lines = [line for line in outside_of_code(text) if not line.startswith("## `")]
    assert any("example.com" in line for line in lines)
    for pattern in (r"@\w", r"#\d", r"https?://", r"www\.", r"(?<!\\)<b>", r"(?<!\\)\]\(", r"(?<!\\)\*\*x"):
        assert not [line for line in lines if re.search(pattern, line)], pattern


def test_names_with_newlines_and_bytes_that_are_no_text(pull_request: PullRequest) -> None:
    folder = os.fsencode(pull_request.repository.folder) + b"/specs/"
    for name in (b"a\n## heading\n@somebody.yaml", b"bad \xff.yaml", b"\x1b[31mred.yaml"):
        Path(os.fsdecode(folder + name)).write_text("no: spec\n")
    pull_request.repository.commit("change")
    done = pull_request.report()
    assert done.returncode == 1 and "\x1b" not in pull_request.text + done.stderr
    assert not [line for line in outside_of_code(pull_request.text) if "somebody" in line or line.startswith("##")]


def test_only_a_comment_of_our_own_is_written_over(pull_request: PullRequest) -> None:
    pull_request.repository.write("specs/new.yaml", SPEC)
    pull_request.repository.commit("change")
    pull_request.report(PLAN="false")
    planted = {"id": 1, "author": "somebody", "body": "<!-- minitron specs -->\nall is well"}
    (pull_request.folder / "comments.json").write_text(json.dumps([planted]))
    assert pull_request.comment().returncode == 0 and pull_request.comment().returncode == 0
    theirs, ours = pull_request.comments
    assert theirs == planted and ours["author"] == BOT and "1 spec changed" in ours["body"]
