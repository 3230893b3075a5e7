"""`minitron compile` killed with -9 again and again: started once more it finishes, with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron.compiler.importance import batches
from minitron.compiler.storage import shards
from minitron.specs.locks import LOCK
from tests.foundry import Foundry

from .tiny import TIMEOUT, environment

# So small that a tiny calibration is many batches, after each of which it is saved, as a large one is every half a minute, and
# that a tiny student is many files.
BATCH_TOKENS, SHARD_BYTES = 12, 2048
SMALL_BATCHES = f"""\
from minitron.compiler.importance import batches, progress_file
from minitron.compiler.storage import shards

batches.BATCH_TOKENS = {BATCH_TOKENS}
progress_file.SAVE_SECONDS, progress_file.SAVE_SHARE = 0.0, 1e9
shards.SHARD_BYTES = {SHARD_BYTES}
"""
STUDENT = {"hidden_size": 24, "intermediate_size": 24}
REFIT = {"refit": "least_squares"}

Sign = Callable[[Path, int], bool]


def written(pattern: str) -> Sign:
    """The process has written such a file of the build."""

    def sign(build: Path, since: int) -> bool:
        try:
            return any(path.stat().st_mtime_ns > since for path in build.glob(pattern))
        except FileNotFoundError:  # it went between the two
            return False

    return sign


def checking(build: Path, since: int) -> bool:
    """The student is written, and its first checks have passed."""
    return written(".minitron-compile.tmp/checked.json")(build, since)


# What is waited for, and for how many seconds at most the process then still lives.
MOMENTS: list[tuple[Sign, float]] = [
    (written("scores.partial.safetensors"), 0.05),
    (written("scores.partial.safetensors"), 0.05),
    (written(".minitron-refit.tmp/values/*.mlp.down_proj.weight.safetensors"), 0.0),
    (written(".minitron-refit.tmp/streams.safetensors"), 0.02),
    (written(".minitron-compile.tmp/.minitron-student.tmp/model-00002-*.safetensors"), 0.0),
    (checking, 0.5),
    (checking, 0.0),
    (written("plan.json"), 0.0),  # all of it takes its place within a moment
]


class Command:
    """`python -m minitron.cli compile`, the same each time."""

    def __init__(self, spec: Path, build: Path, home: Path) -> None:
        (home / "sitecustomize.py").write_text(SMALL_BATCHES)
        self.build = build
        self._line = [sys.executable, "-m", "minitron.cli", "compile", str(spec), "-o", str(build)]
        self._line += ["--device", "cpu", "--threads", "1"]
        packages = os.pathsep.join(filter(None, [str(home), *sys.path]))
        self._environment = environment(home) | {"PYTHONPATH": packages}

    def start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self._line, stdout=pipe, stderr=pipe, text=True, env=self._environment)

    def killed(self, sign: Sign, delay: float) -> str:
        """Starts it, waits for the sign and then so many seconds, and kills it: what it said."""
        since, process = time.time_ns(), self.start()
        deadline = time.monotonic() + TIMEOUT
        while not sign(self.build, since) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        words = process.communicate()[1]
        assert process.returncode == -9, words
        return words

    def finished(self) -> str:
        process = self.start()
        words = process.communicate(timeout=TIMEOUT)[1]
        assert process.returncode == 0, words
        return words


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the process that held it; of a folder the name."""
    paths = (path for path in folder.rglob("*") if path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def test_killed_eight_times_it_ends_with_the_same_bytes(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", BATCH_TOKENS)
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
    data = foundry.calibration | {"samples": 128, "sequence_length": 12}
    loaded = foundry.load(
        foundry.teacher("llama", num_hidden_layers=1), STUDENT, importance={"data": data}, recovery=REFIT
    )
    undisturbed = foundry.compile(loaded, tmp_path / "undisturbed" / "build").folder

    (tmp_path / "home").mkdir()
    command = Command(loaded.path, tmp_path / "killed" / "build", tmp_path / "home")
    draw = random.Random(0)
    said = [command.killed(sign, draw.uniform(0, most)) for sign, most in MOMENTS]
    assert "calibrate: goes on at" in said[1] and "calibrate: goes on at" in said[2]
    assert not any("calibrate: goes on at" in words for words in said[3:]), "scores are made once"
    for words in said[3:]:
        assert f"scores: taken from {command.build / 'scores.safetensors'}" in words
    assert "refit: goes on at" in said[3] and "refit: goes on at" in said[4]
    assert any("of its files were written by a compile that was interrupted" in words for words in said[5:])
    for words in said[6:]:
        assert "student: written by a compile that was interrupted" in words, "nor is the student written again"
    command.finished()  # at the last of these moments it may have been done

    got, wanted = contents(command.build), contents(undisturbed)
    assert got.keys() == wanted.keys(), "and nothing is left over"
    assert [name for name in wanted if got[name] != wanted[name]] == []
