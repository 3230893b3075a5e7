"""What docs/ draws from the code is current: the picture of the packages, and the trace of one model through every stage."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT


@pytest.fixture(scope="module")
def packages() -> ModuleType:
    """docs/packages.py"""
    loader = importlib.util.spec_from_file_location("packages", ROOT / "docs" / "packages.py")
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


def test_the_picture_is_current(packages: ModuleType) -> None:
    text = packages.PAGE.read_text(encoding="utf-8")
    assert packages.page(text) == text, "python docs/packages.py draws it anew"


def test_arrows_that_follow_are_left_out_and_circles_are_not(packages: ModuleType) -> None:
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert packages.reduced(chain) == {"a": {"b"}, "b": {"c"}, "c": set()}
    circle = {"a": {"b", "c"}, "b": {"a", "c"}, "c": set()}
    assert packages.reduced(circle) == circle


def test_imports_are_read_wherever_they_stand(packages: ModuleType) -> None:
    """Under TYPE_CHECKING and in functions too: `cli` imports the compiler in these places only."""
    found = packages.merged(packages.arrows())
    assert {"compiler", "runtime", "specs"} <= found["cli"] and found["runtime"] == {"specs"}
    assert found["specs"] == set()


def test_the_trace_is_what_the_stages_do(tmp_path: Path) -> None:
    """docs/trace.md, made anew. In a process of its own: operators that other tests register would change names."""
    source = "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/docs']; import trace_of_stages; "
    source += "print(trace_of_stages.page(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", source, str(ROOT)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
    assert done.stdout == page, "python docs/trace_of_stages.py writes it anew"
