"""A tiny real teacher, texts and a spec for it, and the real command in a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .tiny import COMMAND, SPEC, TIMEOUT, Command, environment


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def minitron(home: Path) -> Command:
    """Runs the command to its end in a process of its own."""

    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment(home),
            cwd=cwd,
            timeout=TIMEOUT,
        )

    return run


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher/` (a Llama of 3 layers, random weights, its own tokenizer), texts and `tiny.yaml`."""
    from tests import models

    folder = tmp_path_factory.mktemp("workshop")
    (folder / "corpus.txt").write_text(models.text(200), encoding="utf-8")
    (folder / "held_out.txt").write_text(models.text(50, seed=1), encoding="utf-8")
    models.save_teacher(folder / "teacher", models.tiny_config("llama", intermediate_size=64))
    (folder / "tiny.yaml").write_text(SPEC)
    return folder


@pytest.fixture(scope="session")
def finished(workshop: Path, minitron: Command) -> subprocess.CompletedProcess[str]:
    """`minitron run` from beginning to end, once; its build is `workshop/builds/tiny`."""
    return minitron("run", workshop / "tiny.yaml", "--device", "cpu")
