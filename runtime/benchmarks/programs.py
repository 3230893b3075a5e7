"""Runs the programs that models write, each in a process of its own that can only compute (see `confined.py`)."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from minitron.runtime.benchmarks.confined import REFUSED
from minitron.specs.errors import UsageError

ALLOWS_CODE = "HF_ALLOW_CODE_EVAL"
"""The environment variable that allows tasks which run programs written by models; the Hugging Face libraries use the
same one.
"""

CPU_SECONDS = 4
"""The limit of processor time for a program: the usual 3 seconds, and the time that Python needs to start."""

WALL_SECONDS = 20
"""The time after which a program that sleeps or waits is ended; others share the cores meanwhile."""

MEMORY_BYTES = 2**30

_SCRIPT = Path(__file__).with_name("confined.py")
_ANSWER_BYTES = 1000


def code_is_allowed() -> bool:
    """Checks whether the user allows programs written by models to be run."""
    return os.environ.get(ALLOWS_CODE) == "1"


@cache
def check_confinement() -> None:
    """Checks that a process can be confined on this machine. UsageError where not, so that no program is run."""
    status, answer = _run("", "")
    if status != 0:
        reason = answer or f"the process ended with {status}"
        raise UsageError(
            f"programs that models write cannot be confined on this machine ({reason}); run these benchmarks in Linux on "
            "x86-64 or 64-bit Arm, or leave them out of evaluate.suite"
        )


def passing(programs: Sequence[str]) -> list[bool]:
    """Tells for each program whether it came to its end without an error and within the limits. At most as many
    programs run at a time as there are cores.
    """
    with ThreadPoolExecutor(max_workers=max(1, min(len(programs), len(os.sched_getaffinity(0))))) as pool:
        return list(pool.map(_passes, programs))


def _passes(program: str) -> bool:
    # A program that ends early with exit status 0 has not come to its end, and does not know the token.
    token = secrets.token_hex(16)
    status, answer = _run(token, program)
    if status == REFUSED:
        raise OSError(f"a program could not be confined: {answer}")
    return status == 0 and answer == token


def _run(token: str, program: str) -> tuple[int | None, str]:
    """Returns the exit status, None after WALL_SECONDS, and the text written to the pipe that carries the token."""
    read, write = os.pipe()
    try:
        arguments = [sys.executable, "-I", "-S", str(_SCRIPT), *map(str, (write, CPU_SECONDS, MEMORY_BYTES))]
        try:
            ended = subprocess.run(
                arguments,
                input=f"{token}\n{program}".encode("utf-8", errors="surrogatepass"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write,),
                env={},
                cwd="/",
                timeout=WALL_SECONDS,
                check=False,
            )
            status: int | None = ended.returncode
        except subprocess.TimeoutExpired:
            status = None
        os.close(write)
        write = -1
        return status, os.read(read, _ANSWER_BYTES).decode(errors="replace")
    finally:
        os.close(read)
        if write != -1:
            os.close(write)
