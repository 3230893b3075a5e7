"""A compile that is killed twenty times at random moments ends with the bytes of an undisturbed one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.benchmarks.load import FOLDER


@pytest.mark.slow
def test_twenty_kills() -> None:
    command = [sys.executable, str(FOLDER / "kills.py"), "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 kills; ")
