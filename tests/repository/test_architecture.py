"""The picture of the packages in docs/architecture.md is the one that their imports make."""

from __future__ import annotations

import importlib.util
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
