"""`minitron` with a rank that is killed at its seventh step, in the first attempt of torchrun only."""

from __future__ import annotations

import os
import signal
from typing import Any

from minitron.cli.main import main
from minitron.runtime import loop

real = loop.train_step


def train_step(run: Any, state: Any) -> Any:
    if state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, state)


if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    loop.train_step = train_step
main()
