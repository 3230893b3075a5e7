"""A search whose products are in float8, emulated on the CPU: candidates are trained, ranked and gone on from."""

from __future__ import annotations

import shutil

import pytest

from minitron.compiler import make_search, write_search
from minitron.runtime import search
from minitron.specs.builds import SEARCH
from minitron.specs.progress import Silent
from tests.compiler.test_search import search_blocks
from tests.foundry import Foundry

pytest.importorskip("torchao")


def test_candidates_learn_in_float8(foundry: Foundry) -> None:
    blocks = search_blocks(
        foundry, {"rank": {"tokens": 1024, "rungs": 2}}, tokens=4096, compute="float8", optimizer={"lr": [1e-3, 4e-3]}
    )
    loaded = foundry.load(foundry.teacher("llama"), {"hidden_size": 16, "intermediate_size": 32}, **blocks)
    build = foundry.root / "search-float8"
    with foundry.shortened():
        write_search(make_search(loaded, build=build, weights=True), device="cpu", progress=Silent())
    plain = foundry.root / "search-plain"
    shutil.copytree(build, plain)
    plan = plain / SEARCH / "training.yaml"
    text = plan.read_text(encoding="utf-8")
    assert "cpu: float8" in text
    plan.write_text(text.replace("cpu: float8", "cpu: float32"), encoding="utf-8")
    narrow, wide = search(build, device="cpu", progress=Silent()), search(plain, device="cpu", progress=Silent())
    assert narrow.winner is not None and wide.winner is not None
    for one, other in zip(narrow.candidates, wide.candidates, strict=True):
        assert one.rungs and one.rungs[0].kl != other.rungs[0].kl
        assert one.rungs[0].kl == pytest.approx(other.rungs[0].kl, rel=0.05)
