"""Files and folders that a command writes are whole, or are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron.specs.atomic import atomic_folder, atomic_path, remove_leftovers, write_text


class Stopped(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_appears_whole_in_folders_that_are_made_for_it(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "größer")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "größer".encode()
    assert names(tmp_path) == ["new", "new/a.txt"]


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(Stopped), atomic_path(target) as temporary:
        temporary.write_text("ne")
        assert target.read_text() == "old"
        raise Stopped
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "build"
    for name in ("old", "new"):
        with atomic_folder(target) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / name).write_text(name)
    assert names(tmp_path) == ["build", "build/deep", "build/deep/new"]


def test_a_folder_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "build"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(Stopped), atomic_folder(target) as temporary:
        (temporary / "new").write_text("ne")
        raise Stopped
    assert names(tmp_path) == ["build", "build/old"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.17.tmp").write_text("half")
    (tmp_path / ".build.17.tmp").mkdir()
    (tmp_path / ".build.17.tmp" / "half").write_text("half")
    (tmp_path / "mine.tmp").write_text("a user's own")
    (tmp_path / ".hidden").write_text("a user's own")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "mine.tmp"]
