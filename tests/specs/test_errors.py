"""Errors carry their place, their order and the exit code that a command ends with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from minitron.specs import MinitronError, SpecError, SpecInvalid, UsageError, WorkError, load_spec
from minitron.specs.errors import Problem, Refused, first_line, located, placing
from minitron.specs.load import InvalidDraft


def test_an_error_is_one_line_with_its_place() -> None:
    error = SpecError("a.yaml", 14, 3, "student.hidden_size", "4100 is not possible", "write 4096")
    assert str(error) == "a.yaml:14:3: student.hidden_size: 4100 is not possible; write 4096"
    assert str(SpecError("a.yaml", 1, 1, "", "not valid YAML")) == "a.yaml:1:1: not valid YAML"
    assert str(SpecError("--set a=b", 0, 0, "a", "wrong")) == "--set a=b: a: wrong"


def test_errors_are_shown_in_the_order_of_their_places() -> None:
    places = [("b", 1, 1), ("a", 10, 1), ("a", 2, 9), ("a", 2, 3)]
    invalid = SpecInvalid([SpecError(*place, "x", "wrong") for place in places])
    assert [(one.file, one.line, one.column) for one in invalid.errors] == sorted(places)
    assert str(invalid).count("\n") == 3


def test_exit_codes_tell_a_wrong_call_from_work_that_failed() -> None:
    assert (UsageError.exit_code, SpecInvalid.exit_code, WorkError.exit_code) == (2, 2, 1)
    assert all(issubclass(kind, MinitronError) for kind in (UsageError, SpecInvalid, WorkError))
    assert issubclass(SpecInvalid, ValueError) and issubclass(WorkError, RuntimeError)


def test_there_is_no_invalid_spec_without_an_error() -> None:
    with pytest.raises(AssertionError):
        SpecInvalid([])


def test_problems_get_their_places_at_the_edge(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "teacher: {model: m}\nstudent: {hidden_size: 8}\nimportance: {data: {text: a.txt}}\n"
    )
    (tmp_path / "a.txt").write_text("text")
    loaded = load_spec(tmp_path / "a.yaml")
    problem = Problem("student.hidden_size", "is too odd", "write 16")
    (error,) = located([problem], loaded)
    assert str(error) == f"{tmp_path / 'a.yaml'}:2:24: student.hidden_size: is too odd; write 16"
    with pytest.raises(SpecInvalid) as placed, placing(loaded):
        raise Refused([problem, Problem("teacher.model", "is gone")])
    assert [(one.line, one.path) for one in placed.value.errors] == [(1, "teacher.model"), (2, "student.hidden_size")]
    with (
        pytest.raises(SpecInvalid, match=r"1:18: teacher\.model: cannot be fetched$"),
        placing(loaded, "teacher.model"),
    ):
        raise UsageError("cannot be fetched")


def test_what_is_not_of_the_document_passes_the_edge_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("teacher: {model: m}\nstudent: {layers: {drop: [1]}}\n")
    loaded = load_spec(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match=r"^wrong call$"), placing(loaded):
        raise UsageError("wrong call")
    with pytest.raises(WorkError, match=r"^a full disk$"), placing(loaded, "teacher"):
        raise WorkError("a full disk")
    with pytest.raises(SpecInvalid, match=r"teacher: a broken file$"), placing(loaded, "teacher", (WorkError,)):
        raise WorkError("a broken file")
    placed = SpecInvalid([SpecError("other.yaml", 3, 1, "x", "is placed already")])
    with pytest.raises(SpecInvalid) as caught, placing(loaded, "teacher"):
        raise placed
    assert caught.value is placed


def test_errors_travel_between_processes(tmp_path: Path) -> None:
    refused = pickle.loads(pickle.dumps(Refused([Problem("a.b", "is wrong", "write c")])))
    assert isinstance(refused, Refused) and str(refused) == "a.b: is wrong; write c"
    (tmp_path / "a.yaml").write_text("teacher: {model: m}\nstudent: {hidden_size: no}\n")
    with pytest.raises(InvalidDraft) as caught:
        load_spec(tmp_path / "a.yaml")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, SpecInvalid) and str(copy) == str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("one\ntwo"), "one"),
        (KeyError(), "KeyError"),
        (OSError("  \n"), "OSError"),
        (ValueError("\n a"), "a"),
    ],
)
def test_the_first_line_of_what_a_library_says(error: Exception, words: str) -> None:
    assert first_line(error) == words
