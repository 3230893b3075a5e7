"""An interrupt that is swallowed on its way is asked for again between the stages of long work."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWALLOWED = """
import os, signal
from minitron.cli import interrupts
interrupts.watch()
interrupts.check()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("swallowed", flush=True)
try:
    interrupts.check()
except KeyboardInterrupt:
    print("asked for again", flush=True)
"""
IGNORED = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"


def output(source: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split("\n")


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_swallowed_interrupt_is_raised_at_the_next_stage(signal: str) -> None:
    assert output(SWALLOWED.replace("SIGINT", signal))[:2] == ["swallowed", "asked for again"]


def test_a_second_signal_does_not_disturb_the_end() -> None:
    """torchrun and schedulers send it once more."""
    end = "try:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept KeyboardInterrupt:\n    interrupts.no_more()\n"
    again = "os.kill(os.getpid(), signal.SIGTERM)\nprint('said', flush=True)"
    assert output(f"import os, signal\nfrom minitron.cli import interrupts\ninterrupts.watch()\n{end}{again}")[:1] == [
        "said"
    ]


def test_where_the_signal_is_ignored_it_stays_so() -> None:
    assert output(IGNORED + SWALLOWED) == [""]
