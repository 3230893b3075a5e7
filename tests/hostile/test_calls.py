"""Calls that name what they must not: nothing, the teacher's folder, a part of another build, a file on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron.cli.builds import build_folder
from minitron.cli.main import command_line
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.errors import UsageError

SPEC = "teacher: {model: teacher}\nstudent: {layers: {drop: [1]}}\n"


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedSpec:
    """A spec beside its teacher's folder and a build."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "builds" / "other" / "student").mkdir(parents=True)
    (tmp_path / "builds" / "other" / "plan.json").write_text(json.dumps({"format_version": 1, "axes": []}))
    (tmp_path / "text.txt").write_text("the cat")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("teacher", "is the teacher's folder; name another with -o"),
        (
            "builds/other/student",
            "lies inside of the build .*builds/other, whose files these are; name another with -o",
        ),
        ("builds/other/train/new", "lies inside of the build .*builds/other, whose files these are"),
        ("link", "is the teacher's folder; name another"),
        ("text.txt", "a file, and the build needs a folder; name another with -o"),
        ("text.txt/build", r"text\.txt is a file, and no folder can lie in it; name another with -o"),
    ],
)
def test_a_build_takes_nobody_s_place(loaded: LoadedSpec, folder: str, message: str) -> None:
    (loaded.folder / "link").symlink_to(loaded.folder / "teacher")
    with pytest.raises(UsageError, match=message):
        build_folder(loaded.folder / folder, loaded)


# A spec may stand in its teacher's folder, and its builds below it.
@pytest.mark.parametrize("folder", ["builds/other", "builds/new", "builds/other/below", ".", "teacher/builds/small"])
def test_a_build_of_its_own_may_lie_anywhere_else(loaded: LoadedSpec, folder: str) -> None:
    assert build_folder(loaded.folder / folder, loaded) == loaded.folder / folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clean", ""], "error: an argument is empty; write it out: a variable of your shell may not be set"),
        (["compile", "spec.yaml", "-o", ""], "error: an argument is empty"),
        (["validate", "builds/other/plan.json"], "is the plan of a build and not a spec; `minitron show "),
        (["validate", "x" * 300], "cannot be read (File name too long); check the path"),
        (["show", "x" * 300], "a path that is too long; write a shorter one"),
        (["list", "nowhere"], "error: nowhere: there is no such folder; name one that holds builds"),
        (["list", "text.txt"], "error: text.txt: is a file; name one that holds builds"),
    ],
)
def test_a_call_that_names_nothing(
    loaded: LoadedSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(loaded.folder)
    before = sorted(loaded.folder.rglob("*"))
    assert command_line(arguments) == 2
    assert message in capsys.readouterr().err and sorted(loaded.folder.rglob("*")) == before
