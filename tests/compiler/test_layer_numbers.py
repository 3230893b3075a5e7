"""Constants that follow a layer's number, and tables of which the only reader is dropped: known in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from minitron.specs.errors import SpecInvalid
from tests.foundry import Foundry
from tests.models import COMMON, save_teacher


def saved(folder: Path, family: str, **keys: Any) -> Path:
    known = AutoConfig.for_model(family)
    common = {key: value for key, value in COMMON.items() if hasattr(known, key) and key not in known.attribute_map}
    return save_teacher(folder / family, AutoConfig.for_model(family, **common | keys))


GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 40, "n_positions": 64}
NUMBERED: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "diffllama": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("family", NUMBERED)
def test_a_scale_that_follows_the_layers_number(foundry: Foundry, tmp_path: Path, family: str) -> None:
    teacher = saved(tmp_path, family, **NUMBERED[family])
    with pytest.raises(SpecInvalid, match=r"on how many layers stand before or beside it .* no repair is known for it"):
        foundry.plan(teacher, {"layers": {"drop": [1]}})
    foundry.plan(teacher, {"layers": {"drop": [3]}})  # the others keep their numbers
    made = foundry.build(teacher, {"intermediate_size": 24}, program=False)
    assert all(check["passed"] for check in made.checks.values())


def test_the_only_layer_of_a_kind_can_be_dropped(foundry: Foundry, tmp_path: Path) -> None:
    """Its rotary table is needed no more: the student does not have it."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    keys = {
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "layer_types": kinds,
        "num_hidden_layers": 3,
    }
    made = foundry.build(saved(tmp_path, "gemma3_text", **keys), {"layers": {"drop": [1]}}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    assert made.config["layer_types"] == ["sliding_attention", "sliding_attention"]
