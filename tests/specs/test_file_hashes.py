"""Remembered hashes: read once, and never wrong about a file that was replaced."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from minitron.specs import file_hashes
from minitron.specs.file_hashes import file_hash, store


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also small files are remembered, at once, in a folder of this test."""
    monkeypatch.setattr(file_hashes, "LEAST_BYTES", 1)
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    return path


def sha(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def unread(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    read: list[Path] = []
    original = file_hashes._hash
    monkeypatch.setattr(file_hashes, "_hash", lambda path: read.append(path) or original(path))  # type: ignore[func-returns-value]
    return read


def test_a_file_is_read_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = unread(monkeypatch)
    assert [file_hash(weights) for _ in range(3)] == [sha(b"first")] * 3
    assert read == [weights] and store().is_file()


def test_a_file_that_was_replaced_in_place_is_read_again(weights: Path) -> None:
    """Also with the times of the old one: those of the inode change all the same."""
    before = weights.stat()
    assert file_hash(weights) == sha(b"first")
    weights.write_bytes(b"other")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hash(weights) == sha(b"other")


def test_a_file_that_was_moved_into_its_place_is_read_again(weights: Path, tmp_path: Path) -> None:
    assert file_hash(weights) == sha(b"first")
    before = weights.stat()
    (tmp_path / "new").write_bytes(b"other")
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(weights)
    assert file_hash(weights) == sha(b"other")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_a_broken_memory_is_none(weights: Path, content: str) -> None:
    store().parent.mkdir(parents=True)
    store().write_text(content)
    assert file_hash(weights) == sha(b"first")


def test_what_changed_a_moment_ago_is_not_remembered(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again under the same times."""
    monkeypatch.setattr(file_hashes, "SETTLED_NS", 3600 * 10**9)
    read = unread(monkeypatch)
    assert file_hash(weights) == file_hash(weights) and len(read) == 2


def test_a_memory_that_cannot_be_written_costs_time_only(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_hash(weights) == sha(b"first")


def test_the_memory_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "MOST_ENTRIES", 3)
    for number in range(5):
        (tmp_path / str(number)).write_text(str(number))
        file_hash(tmp_path / str(number))
    assert [Path(key).name for key in file_hashes._remembered()] == ["2", "3", "4"]
