"""What the tests of the commands share: a spec for the tiny teacher, how a command is started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMAND = (sys.executable, "-m", "minitron")
# A process that hangs is killed and fails its test; none of these takes more than seconds.
TIMEOUT = 300

SPEC = """\
name: tiny
teacher:
  model: teacher
  dtype: float32
student:
  hidden_size: 24
  intermediate_size: 48
  num_hidden_layers: 2
importance:
  data:
    text: [corpus.txt]
    document: line
    samples: 8
    sequence_length: 32
distill:
  data: {text: [corpus.txt], document: line}
  tokens: 4096
  sequence_length: 32
  global_batch_size: 8
  optimizer: {lr: 1e-3, warmup_steps: 2}
evaluate:
  held_out: {text: [held_out.txt], document: line}
"""

Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(home: Path) -> dict[str, str]:
    """One thread, an empty home, no network, no colours asked for."""
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return kept | {"OMP_NUM_THREADS": "1", "HOME": str(home), "HF_HUB_OFFLINE": "1"}
