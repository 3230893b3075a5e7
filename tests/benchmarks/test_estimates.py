"""The plan's estimates stay true: within a tenth of what a real small run takes, and no more hopeful than published ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from minitron.compiler.estimate.hardware import ASSUMED_MFU
from tests.benchmarks.load import load_benchmark

SHAPE = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 2048},
    "student": {"hidden_size": 96},
    "length": 128,
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_benchmark("estimates")


def test_a_run_takes_what_its_plan_says(bench: ModuleType, tmp_path: Path) -> None:
    rows = bench.compare("small", SHAPE, tmp_path, "cpu", ["plain"])
    assert [row.what for row in rows] == [
        "calibrate: peak bytes", "calibrate: FLOPs", "plain: peak bytes", "plain: FLOPs of a step",
    ]  # fmt: skip
    assert {row.what: row.ratio for row in rows if not 0.9 <= row.ratio <= 1.1} == {}


def test_the_default_is_no_more_hopeful_than_published_runs(bench: ModuleType) -> None:
    implied = [bench.implied_mfu(run) for run in bench.PUBLISHED]
    assert min(implied) >= ASSUMED_MFU and max(implied) < 1
