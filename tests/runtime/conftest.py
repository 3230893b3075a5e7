from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.runtime import tiny


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that nobody trains in; `build` copies it."""
    return tiny.make_build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def build(tiny_build: Path, tmp_path: Path) -> Path:
    """A fresh build folder with teacher and texts beside it."""
    shutil.copytree(tiny_build.parent, tmp_path / "here")
    return tmp_path / "here" / tiny_build.name


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models: more threads only wait for each other."""
    torch.set_num_threads(1)
