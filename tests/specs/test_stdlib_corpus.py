"""The corpus that every machine has: what belongs to it, and that its two sides never meet."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from minitron.specs.errors import UsageError, WorkError
from minitron.specs.stdlib_corpus import is_held_out, stdlib_files

ROOT = Path(sysconfig.get_path("stdlib")).resolve()
TRAIN = stdlib_files("train")
HELD_OUT = stdlib_files("held_out")


def top_levels(files: list[Path]) -> set[str]:
    return {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files}


def test_no_module_stands_on_both_sides() -> None:
    assert TRAIN and HELD_OUT
    assert not top_levels(TRAIN) & top_levels(HELD_OUT)


def test_about_a_fifteenth_is_held_out() -> None:
    held_out = sum(path.stat().st_size for path in HELD_OUT)
    total = held_out + sum(path.stat().st_size for path in TRAIN)
    assert 0.05 <= held_out / total <= 0.08
    assert total > 4_000_000, "far less than a standard library"


def test_a_fresh_process_sees_the_same_files_in_the_same_order() -> None:
    code = "from minitron.specs.stdlib_corpus import *; print(*stdlib_files('held_out'), sep='\\n')"
    # Another hash seed: the rule must not lean on Python's own hash of strings.
    fresh = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert fresh.stdout.splitlines() == [str(path) for path in HELD_OUT], fresh.stderr
    assert sorted(HELD_OUT) == HELD_OUT


@pytest.mark.parametrize("module", ["functools", "threading", "contextlib", "doctest"])
def test_the_committed_teacher_never_saw_these(module: str) -> None:
    assert is_held_out(module)
    assert ROOT / f"{module}.py" in HELD_OUT


def test_a_module_keeps_its_side_when_it_becomes_the_pure_python_twin() -> None:
    for name in sys.stdlib_module_names:
        bare = name.lstrip("_")
        assert is_held_out(bare) == is_held_out(f"_{bare}") == is_held_out(f"_py{bare}") == is_held_out(f"_py_{bare}")


def test_only_library_sources_in_utf8() -> None:
    for path in TRAIN + HELD_OUT:
        parts = path.relative_to(ROOT).parts
        assert path.suffix == ".py" and path.read_text(encoding="utf-8")
        assert not {"site-packages", "test", "tests", "__pycache__", "idlelib", "encodings"} & set(parts), path
        assert parts[0].removesuffix(".py") in sys.stdlib_module_names


def test_files_that_are_no_library_sources_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages" / "json").mkdir(parents=True)
    (tmp_path / "json" / "decoder.py").write_text("x = 1\n")
    (tmp_path / "json" / "tests" / "test_it.py").write_text("x = 1\n")
    (tmp_path / "site-packages" / "json" / "other.py").write_text("x = 1\n")
    (tmp_path / "sitecustomize.py").write_text("x = 1\n")
    (tmp_path / "abc.py").write_bytes(b"# latin-1: \xe9\n")
    (tmp_path / "ast.py").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert stdlib_files("train") == [tmp_path / "json" / "decoder.py"]


def test_a_python_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(WorkError, match="no sources of the standard library"):
        stdlib_files("train")


def test_another_split_is_refused() -> None:
    with pytest.raises(UsageError, match="python-stdlib:valid is not a split"):
        stdlib_files("valid")  # type: ignore[arg-type]
