"""The benchmark of a compile: what fits a quarter of the checkpoint, and that a limit changes no byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.load import FOLDER, load_benchmark

# The checkpoint. All of it in float32 would be 400 MB.
GIGABYTES = 0.2
# Bytes beyond a quarter of a checkpoint this small: the graphs of its layers, logits, what allocators keep.
BESIDE = 64e6
# What a limit of the kernel counts besides, as a share of the checkpoint and in bytes: files that transformers maps, of teacher
# and student, and what a process reserves and does not use, as threads' stacks and holes of the heap. Together less than the
# checkpoint in float32 beside its files.
MAPPED, UNUSED = 1.5, 36e6


@pytest.mark.slow
def test_a_whole_compile_takes_a_quarter_of_the_checkpoint(tmp_path: Path) -> None:
    """Every check included, where the kernel refuses more; student/ is the same as without a limit."""
    command = [sys.executable, str(FOLDER / "compile.py"), "--gigabytes", str(GIGABYTES), "--work", str(tmp_path)]
    command += ["--samples", "16", "--length", "64", "--part", "whole"]
    command += ["--limit", str(int(GIGABYTES * 1e9 * (1 / 4 + MAPPED) + BESIDE + UNUSED))]
    bench = load_benchmark("compile")
    bench.generate(tmp_path / "-".join(map(str, bench.shape_of(GIGABYTES))), bench.shape_of(GIGABYTES))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same bytes"] == 1.0
    assert found["peak, MB"] * 1e6 < GIGABYTES * 1e9 / 4 + BESIDE


@pytest.mark.parametrize("gigabytes", [0.2, 1.0])
def test_generated_checkpoints_have_layers_as_real_ones_have(gigabytes: float) -> None:
    hidden, ffn, layers, heads, groups, vocabulary = load_benchmark("compile").shape_of(gigabytes)
    size = 2 * (2 * vocabulary * hidden + layers * (2.5 * hidden * hidden + 3 * hidden * ffn))
    assert size == pytest.approx(gigabytes * 1e9, rel=0.1)
    assert layers >= 14 and hidden % heads == 0 and heads % groups == 0
