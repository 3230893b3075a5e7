"""A student's config.json says the same to loaders of older keys, and its rules never contradict its lists."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from minitron.compiler.capture.layer_config import with_layers
from minitron.compiler.emit.older_loaders import for_older_loaders
from tests.foundry import Foundry
from tests.models import ROTARY, tiny_config

WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}


def spoken(config: Any) -> dict[str, Any]:
    return for_older_loaders(config, config.to_dict() | {"dtype": "bfloat16"})


def test_flat_parameters() -> None:
    document = spoken(tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    assert document["rope_theta"] == 5e5 and "rope_scaling" not in document
    assert document["torch_dtype"] == document["dtype"] == "bfloat16"
    assert document["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}


def test_scaling() -> None:
    document = spoken(tiny_config("qwen3", rope_parameters=YARN))
    assert document["rope_theta"] == 5e5
    assert document["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_keys_of_other_names_are_found_by_asking_the_class() -> None:
    """GPT-NeoX knew theta and the part of a head that is rotated by names of its own."""
    document = spoken(tiny_config("gpt_neox", rope_parameters=ROTARY | {"rope_theta": 5e5}))
    assert (document["rotary_emb_base"], document["rotary_pct"]) == (5e5, 0.5)


def test_parameters_by_kind_of_layer() -> None:
    parts = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
        "full_attention": {"rope_type": "linear", "rope_theta": 8e5, "factor": 8.0},
    }
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, rope_parameters=parts)
    document = spoken(config)
    assert (document["rope_theta"], document["rope_local_base_freq"]) == (8e5, 9e3)
    assert document["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt_neox", "phi3", "mistral", "gemma2", "mixtral", "gpt_oss", "deepseek_v3"]
)
def test_transformers_reads_the_same_with_them(family: str) -> None:
    config = tiny_config(family)
    before = config.to_dict()
    read = type(config).from_dict(spoken(config)).to_dict()
    assert {key: read[key] for key in before if key != "dtype"} == {k: v for k, v in before.items() if k != "dtype"}


def test_a_student_has_them(foundry: Foundry) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    made = foundry.build(teacher, {"intermediate_size": 24}, program=False)
    assert made.config["rope_theta"] == 5e5 and made.config["torch_dtype"] == "float32"
    assert all(check["passed"] for check in made.checks.values())


@pytest.mark.parametrize(
    ("family", "keys", "kept", "said"),
    [
        ("qwen2", WINDOWS, [0, 3, 4], {"max_window_layers": 1}),
        ("qwen2", WINDOWS, [0, 1], {"max_window_layers": 2}),
        ("smollm3", {"no_rope_layer_interval": 3}, [0, 2, 3, 5], {"no_rope_layer_interval": 2}),
        ("smollm3", {"no_rope_layer_interval": 3}, [2, 3, 4], {"no_rope_layer_interval": None}),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 3}, [0, 2, 3, 5], {"sliding_window_pattern": 2}),
    ],
)  # fmt: skip
def test_rules_follow_the_lists(family: str, keys: dict[str, Any], kept: list[int], said: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=6, **keys)
    student = with_layers(config, 6, kept)
    for key, value in said.items():
        if value is None:
            assert key not in student.to_dict() or hasattr(type(config), key)
        else:
            assert getattr(student, key) == value
    again = type(config).from_dict(student.to_dict())
    for name in ("layer_types", "no_rope_layers"):
        assert getattr(again, name, None) == getattr(student, name, None)
