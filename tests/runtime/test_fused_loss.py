"""The Triton kernel of the loss, run by Triton's interpreter where there is no GPU.

The interpreter has to be asked for before Triton is imported, by an environment variable that would slow down every
kernel of a process with a GPU. So `fused_cases.py` runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def test_the_kernel_computes_what_torch_computes() -> None:
    cases = Path(__file__).with_name("fused_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """The interpreter runs Python: types that change in a loop, or an operation that no GPU has, it does not mind."""
    script = Path(__file__).with_name("fused_compiles.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.split() == ["forward_kl", "reverse_kl", "jsd", "sampled"]
