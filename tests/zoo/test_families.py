"""Every family through the whole compiler: each axis alone, all together, what is refused and why."""

from __future__ import annotations

import pytest

from tests.foundry import Foundry

ALONE: dict[str, int] = {
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}
CHECKS = {"widths", "reload", "masked", "permutation", "program", "head"}


@pytest.mark.parametrize("axis", ALONE)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral"])
def test_each_axis_alone(foundry: Foundry, family: str, axis: str) -> None:
    build = foundry.build(foundry.teacher(family), {axis: ALONE[axis]})
    assert build.config[axis] == ALONE[axis]
    assert set(build.checks) == CHECKS
