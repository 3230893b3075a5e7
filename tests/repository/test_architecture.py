"""What docs/ draws from the code is current: the picture of the packages, and the trace of one model through every stage."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT


def script(name: str) -> ModuleType:
    """docs/NAME.py"""
    loader = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packages() -> ModuleType:
    return script("packages")


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


def test_every_kind_of_fault_is_counted() -> None:
    """The table of docs/reliability.md; its numbers are made by running the tests, and no case stands in two kinds."""
    faults = script("faults")
    page = faults.PAGE.read_text(encoding="utf-8")
    rows = dict(line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| ") and line.count(" | ") > 1)
    files = [file for _, files in faults.KINDS.values() for file in files]
    assert len(files) == len(set(files)) and all((ROOT / file).is_file() for file in files)
    every = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert {file for file in every if faults.OF_FAULTS.match(file)} <= set(files), (
        "add them to a kind in docs/faults.py"
    )
    counts = {kind: int(rows[f"| {kind}"]) for kind in [*faults.KINDS, "all"]}
    assert min(counts.values()) > 0 and counts.pop("all") == sum(counts.values())
    assert faults.page(page, counts) == page, "python docs/faults.py writes it anew"
