"""Files and folders that a command writes are whole, or are not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron.specs.atomic import (
    MARKER,
    atomic_folder,
    atomic_path,
    check_writable,
    claim_folder,
    kept_folder,
    remove_leftovers,
    temporary_path,
    write_text,
)
from minitron.specs.errors import UsageError, WorkError


class Stopped(Exception):
    pass


def names(folder: Path) -> list[str]:
    """Everything in a folder but for marks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != MARKER)


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


def test_an_error_names_the_file_and_not_the_hidden_one_beside_it(tmp_path: Path) -> None:
    """A folder where the hidden file would be cannot be written to, whoever asks."""
    target = tmp_path / "a.txt"
    temporary_path(target, os.getpid()).mkdir()
    for write in (lambda: write_text(target, "text"), lambda: check_writable(target, 8)):
        with pytest.raises(IsADirectoryError) as caught:
            write()
        assert caught.value.filename == str(target)


def test_what_fits_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.txt", 1 << 16)
    assert names(tmp_path) == []


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


@pytest.mark.parametrize(("error", "left"), [(KeyboardInterrupt, ["whole"]), (OSError, [])])
def test_a_folder_may_be_gone_on_with_where_it_was_interrupted(
    tmp_path: Path, error: type[BaseException], left: list[str]
) -> None:
    target = tmp_path / "student"
    with pytest.raises(error), atomic_folder(target, resumed=True) as temporary:
        write_text(temporary / "whole", "1")
        temporary_path(temporary / "half", 17).write_text("ha")
        raise error
    assert not target.exists()
    with atomic_folder(target, resumed=True) as temporary:
        assert names(temporary) == left, "what an error left is not kept: the disk may be full"
        write_text(temporary / "half", "2")
    assert names(tmp_path) == sorted(["student", "student/half", *(f"student/{name}" for name in left)])


def test_what_was_kept_for_something_else_is_removed(tmp_path: Path) -> None:
    for made_for, there in (("a", []), ("a", ["values"]), ("b", [])):
        folder = kept_folder(tmp_path / "refit", made_for)
        assert [name for name in names(folder) if name != "made-for"] == there
        (folder / "values").write_text(made_for)
    remove_leftovers(tmp_path, but=("refit", "compile"))
    assert folder.is_dir()
    remove_leftovers(tmp_path, but=("compile",))
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_a_file_is_named_and_not_the_hidden_file(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path / "scores", "text")
    assert caught.value.filename == str(tmp_path / "scores") and names(tmp_path) == ["scores"]


def test_a_link_in_the_place_of_what_was_kept_is_not_followed(tmp_path: Path) -> None:
    (somebody := tmp_path / "somebody").mkdir()
    (somebody / "made-for").write_text("a")
    place = tmp_path / ".minitron-refit.tmp"
    place.symlink_to(somebody)
    assert names(kept_folder(tmp_path / "refit", "a")) == ["made-for"] and not place.is_symlink()
    assert names(somebody) == ["made-for"]
    remove_leftovers(tmp_path)
    place.write_text("a file")
    assert kept_folder(tmp_path / "refit", "a").is_dir()


def test_the_old_folder_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the old one is being removed, the new one is there."""
    target = tmp_path / "build"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("old")

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            assert names(target) == ["new"]
            raise Stopped

    with pytest.raises(Stopped), atomic_folder(target) as temporary:
        monkeypatch.setattr(shutil, "rmtree", killed)
        (temporary / "new").write_text("new")
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["build", "build/new"]


@pytest.mark.parametrize("context", [atomic_path, atomic_folder])
def test_a_full_disk_is_named_whoever_writes(tmp_path: Path, context: Callable[[Path], Any]) -> None:
    """safetensors, being written in Rust, has an error of its own that quotes the system's."""
    with pytest.raises(OSError) as caught, context(tmp_path / "target"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "target"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("a bug of ours"), WorkError("a.bin: cannot be read (os error 5)")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    """What could not be read is not blamed on what was being written."""
    with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "target"):
        raise error
    assert caught.value is error


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    temporary_path(tmp_path / "a.txt", 17).write_text("half")
    temporary_path(tmp_path / "build", 17).mkdir()
    (temporary_path(tmp_path / "build", 17) / "half").write_text("half")
    mine = [".a.txt.17.tmp", ".hidden", ".mine.tmp", "mine.tmp", ".minitron.lock"]
    for name in mine:
        (tmp_path / name).write_text("a user's own")
    remove_leftovers(tmp_path, "build")
    assert names(tmp_path) == sorted([temporary_path(tmp_path / "a.txt", 17).name, *mine])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(mine)


def test_a_folder_that_somebody_else_made_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    refused = pytest.raises(UsageError, match=r"model was not made by minitron, and would be replaced; move it away")
    with refused, atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["model", "model/thesis.txt"]


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "real") as temporary:
        (temporary / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    refused = pytest.raises(UsageError, match=r"link is a link, and would be replaced; remove the link")
    with refused, atomic_folder(tmp_path / "link"):
        pass
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "old").is_file()


def test_a_claimed_folder_holds_nothing_of_anybody_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("beside")
    claim_folder(tmp_path, ["metrics.jsonl"], "name another")
    (tmp_path / "metrics.jsonl").write_text("ours now")
    claim_folder(tmp_path, ["metrics.jsonl"], "name another")
    (tmp_path / MARKER).unlink()
    with pytest.raises(
        UsageError, match=r"holds metrics\.jsonl, which minitron did not make; move it away, or name another"
    ):
        claim_folder(tmp_path, ["metrics.jsonl"], "name another")
