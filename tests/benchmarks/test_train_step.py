"""The two loops of the benchmark do the same, on the shapes that it says."""

from __future__ import annotations

import argparse
from types import ModuleType

import pytest
import torch

from minitron.runtime.world import World
from tests.benchmarks.load import load_benchmark


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_benchmark("train_step")


def test_both_loops_learn_the_same(bench: ModuleType) -> None:
    args, world = (
        argparse.Namespace(compile=False, recompute=False, weights="float32", states="float32", float8=[]),
        World(0, 1, torch.device("cpu")),
    )
    plain, ours = (bench.METHODS[name](args, bench.SHAPES["tiny"], world) for name in ("plain", "minitron"))
    for step in range(3):
        assert ours(step) == pytest.approx(plain(step), rel=1e-5)


def test_products_in_float8_are_near(bench: ModuleType) -> None:
    pytest.importorskip("torchao")
    world, losses = World(0, 1, torch.device("cpu")), []
    for float8 in ([], ["student", "teacher"]):
        args = argparse.Namespace(compile=False, recompute=True, weights="float32", states="float32", float8=float8)
        losses.append(bench.METHODS["minitron"](args, bench.SHAPES["tiny"], world)(0))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_large_shapes_have_the_published_sizes(bench: ModuleType) -> None:
    shape = bench.SHAPES["12b-to-8b"]
    counts = [bench.parameters(shape, side) for side in (shape.teacher, shape.student)]
    assert counts == [12_247_782_400, 8_414_105_600]


def test_sizes_are_those_of_the_models(bench: ModuleType) -> None:
    shape = bench.SHAPES["tiny"]
    model = bench.empty_model(shape, shape.student, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == bench.parameters(shape, shape.student)
