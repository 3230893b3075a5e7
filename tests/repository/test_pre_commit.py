"""The hook, run by the real pre-commit in a repository laid out as examples/repository is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT, Repository

PRE_COMMIT = (sys.executable, "-m", "pre_commit")
GOOD = "teacher: {model: org/model}\nstudent: {layers: {drop: [1]}}\n"
BAD = "teacher: {model: org/model}\nstudent:\n  hiden_size: 64\n"


@pytest.fixture
def repository(tmp_path: Path, programs: Path) -> Repository:
    """Configured as the example is, with the hook from a clone of this checkout's manifest."""
    hooks = Repository(tmp_path / "hooks", programs, tmp_path)
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks.folder)
    revision = hooks.commit("hooks")
    config = yaml.safe_load((ROOT / "examples" / "repository" / ".pre-commit-config.yaml").read_text())
    config["repos"][0] |= {"repo": str(hooks.folder), "rev": revision}
    repository = Repository(tmp_path / "specs", programs, tmp_path)
    repository.write(".pre-commit-config.yaml", yaml.safe_dump(config))
    return repository


def test_wrong_specs_are_not_committed(repository: Repository) -> None:
    repository.write("specs/good.yaml", GOOD)
    repository.write("specs/deep/bad.yaml", BAD)
    repository.write("specs/good.lock.yaml", "format_version: 1\n")  # a lock, and no spec
    repository.write("other.yaml", "anything: else\n")
    repository.write("specs/notes.txt", "no YAML\n")
    installed = repository.run(*PRE_COMMIT, "install")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    repository.git("add", "--all")
    refused = repository.run("git", "commit", "--message", "specs")
    words = refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert "validate minitron specs" in words and "Failed" in words
    assert "specs/deep/bad.yaml:3:3: student.hiden_size" in words and "did you mean" in words
    assert "lock.yaml" not in words and "other.yaml" not in words

    repository.write("specs/deep/bad.yaml", GOOD)
    repository.git("add", "--all")
    taken = repository.run("git", "commit", "--message", "specs")
    assert taken.returncode == 0, taken.stdout + taken.stderr
    assert repository.git("log", "--format=%s") == "specs"


def test_manifest_and_example_are_what_pre_commit_takes(repository: Repository) -> None:
    for command, file in (
        ("validate-manifest", ROOT / ".pre-commit-hooks.yaml"),
        ("validate-config", ROOT / "examples" / "repository" / ".pre-commit-config.yaml"),
    ):
        done = repository.run(*PRE_COMMIT, command, file)
        assert done.returncode == 0, done.stdout + done.stderr
