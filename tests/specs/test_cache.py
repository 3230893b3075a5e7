"""The cache beside the builds: where it is, what is in it, what may be removed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from minitron.specs.cache import (
    ABANDONED_SECONDS,
    SCORES,
    TOKENS,
    cache_folder,
    entries,
    entry_path,
    link_file,
    remove,
    share_file,
    tokens_folder,
)
from minitron.specs.errors import UsageError


@pytest.fixture(autouse=True)
def default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINITRON_CACHE")


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(tmp_path / "builds" / "a") == tmp_path / "builds" / ".cache"
    # In a home folder `.cache` is what all programs share.
    assert cache_folder(tmp_path / "a") == tmp_path / ".minitron-cache"
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder(tmp_path / "builds" / "a") == tmp_path / "elsewhere"
    monkeypatch.setenv("MINITRON_CACHE", "none")
    assert cache_folder(tmp_path / "builds" / "a") is None
    assert entry_path(tmp_path / "builds" / "a", SCORES, "x") is None
    assert tokens_folder(tmp_path / "a", tmp_path / "a" / "train") == tmp_path / "a" / "train" / "data"


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "builds" / ".cache" / "tokens").mkdir(parents=True)
    with pytest.raises(
        UsageError, match="holds tokens, which minitron did not make; move it away, or set MINITRON_CACHE"
    ):
        entry_path(tmp_path / "builds" / "a", SCORES, "x")
    (tmp_path / ".minitron-cache").write_text("a file")
    with pytest.raises(
        UsageError, match="a file, and the cache needs a folder; set MINITRON_CACHE to a folder, or to none"
    ):
        entry_path(tmp_path / "a", SCORES, "x")
    with pytest.raises(UsageError, match="is not a cache of minitron"):
        entries(tmp_path / "builds" / ".cache")


def test_files_are_shared_and_not_copied(tmp_path: Path) -> None:
    build = tmp_path / "builds" / "a"
    build.mkdir(parents=True)
    (build / "scores").write_text("one")
    place = entry_path(build, SCORES, "key.safetensors")
    assert place is not None
    share_file(build / "scores", place)
    share_file(build / "scores", place)
    assert place.samefile(build / "scores")
    # What replaces the build's file leaves the cache's as it is.
    link_file(place, tmp_path / "other")
    (tmp_path / "new").write_text("two")
    (tmp_path / "new").replace(build / "scores")
    assert place.read_text() == (tmp_path / "other").read_text() == "one"


def test_without_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a").write_text("one")
    link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "one" and not (tmp_path / "b").samefile(tmp_path / "a")


def test_entries_are_listed_by_their_last_use_and_removed(tmp_path: Path) -> None:
    build, cache = tmp_path / "builds" / "a", tmp_path / "builds" / ".cache"
    assert entries(cache) == []
    scores, tokens = (entry_path(build, kind, "key") for kind in (SCORES, TOKENS))
    assert scores is not None and tokens is not None
    scores.write_text("12345")
    tokens.mkdir()
    (tokens / "shard").write_text("123")
    for age, path in ((100, tokens), (50, scores)):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    (cache / "tokens" / ".minitron-half.tmp").mkdir()
    found = entries(cache)
    assert [(one.kind, one.bytes, one.used) for one in found] == [("tokens", 3, 999_900), ("scores", 5, 999_950)]
    remove(found[0])
    assert [one.kind for one in entries(cache)] == ["scores"] and not tokens.exists()


def test_what_killed_processes_left_is_removed_by_the_next_writer_once_it_is_old(tmp_path: Path) -> None:
    build = tmp_path / "builds" / "a"
    place = entry_path(build, SCORES, "key.safetensors")
    assert place is not None
    names = (".minitron-old.1.tmp", ".minitron-new.2.tmp", ".minitron-at-work.3.tmp", "entry", ".own")
    for name in names:
        (place.parent / name).mkdir() if "work" in name else (place.parent / name).write_text("half")
    (place.parent / ".minitron-at-work.3.tmp" / "shard").write_text("written just now")
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for name in names:
        if "new" not in name:
            os.utime(place.parent / name, (long_ago, long_ago))
    entry_path(build, SCORES, "key.safetensors")
    assert {path.name for path in place.parent.iterdir()} == set(names) - {".minitron-old.1.tmp"}
