"""Every exception ends as a sentence and an exit code."""

from __future__ import annotations

import errno

import pytest

from minitron.cli.failures import failure_of
from minitron.specs.errors import SpecError, SpecInvalid, UsageError, WorkError


def test_errors_of_a_spec_are_lines_that_an_editor_can_jump_to() -> None:
    errors = [
        SpecError("a.yaml", 14, 3, "student.hidden_size", "4100 is not a multiple of 8", "write 4096 or 4104"),
        SpecError("a.yaml", 2, 1, "", "unknown key `studnet`", "did you mean `student`"),
    ]
    failure = failure_of(SpecInvalid(errors))
    assert failure.exit_code == 2
    assert failure.lines() == [
        "a.yaml:2:1: unknown key `studnet`; did you mean `student`",
        "a.yaml:14:3: student.hidden_size: 4100 is not a multiple of 8; write 4096 or 4104",
    ]
    assert failure.document()["errors"][1] == {  # type: ignore[index]
        "file": "a.yaml",
        "line": 14,
        "column": 3,
        "path": "student.hidden_size",
        "message": "4100 is not a multiple of 8",
        "hint": "write 4096 or 4104",
    }


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("x: no such build folder"), 2, "error: x: no such build folder"),
        (WorkError("the checkpoint is cut short"), 1, "error: the checkpoint is cut short"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/b/model"),
            1,
            "error: /b/model: no space left on the disk",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/b"), 1, "error: /b: the file system is read-only; "),
        (PermissionError(errno.EACCES, "Permission denied", "/b"), 1, "error: /b: no permission; "),
        (FileNotFoundError(errno.ENOENT, "No such file", "/c.json"), 1, "error: /c.json: no such file or folder; "),
        (
            ConnectionResetError(errno.ECONNRESET, "Connection reset"),
            1,
            "error: the network failed: Connection reset; ",
        ),
        (OSError(errno.EIO, "Input/output error", "/b"), 1, "error: /b: input/output error"),
        (OSError("some words"), 1, "error: some words"),
        (MemoryError(), 1, "error: out of memory; "),
        (KeyboardInterrupt(), 130, "interrupted; the same command, started again, goes on where it was"),
        (KeyError("widths"), 1, "error: unexpected KeyError: 'widths'; run again with --debug"),
        (AssertionError(), 1, "error: unexpected AssertionError; run again with --debug"),
        (ValueError("first line\nsecond line"), 1, "error: unexpected ValueError: first line; run again with --debug"),
    ],
)
def test_exit_code_and_sentence(error: BaseException, code: int, line: str) -> None:
    failure = failure_of(error)
    assert failure.exit_code == code
    assert len(failure.lines()) == 1
    assert failure.lines()[0].startswith(line)


def test_out_of_memory_of_torch_is_recognised() -> None:
    torch = pytest.importorskip("torch")
    assert "out of memory" in failure_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")).lines()[0]
