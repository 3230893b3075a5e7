"""Errors carry their place, their order and the exit code that a command ends with."""

from __future__ import annotations

import pytest

from minitron.specs import MinitronError, SpecError, SpecInvalid, UsageError, WorkError


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
