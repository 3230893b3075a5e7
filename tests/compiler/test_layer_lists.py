"""Which lists of a configuration follow dropped layers, and what else has a number for each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitron.compiler.capture.capture import capture
from minitron.compiler.capture.layer_config import with_layers
from minitron.compiler.capture.layer_lists import lists_over_layers, read_by_layer
from minitron.compiler.rewrite.scale_repair import changed_buffers
from tests.foundry import Foundry
from tests.models import tiny_config
from tests.zoo.configs import config_of

IDS = [2, 3, 4, 5]


def test_token_ids_stay_however_many_there_are(foundry: Foundry) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=4, eos_token_id=IDS)
    build = foundry.build(teacher, {"layers": {"drop": [1]}}, program=False)
    assert build.config["eos_token_id"] == IDS
    assert build.document("student/generation_config.json")["eos_token_id"] == IDS


def test_so_does_a_list_that_no_layer_reads_its_entry_of() -> None:
    """The least and the largest time step of a scan, in a model of two layers: every layer reads both."""
    config = config_of("mamba2")
    config.num_hidden_layers, config.time_step_limit = 2, [0.01, 0.5]
    assert with_layers(config, 2, [1]).time_step_limit == [0.01, 0.5]
    assert lists_over_layers(config, 2) == {}


@pytest.mark.parametrize(
    ("family", "key", "kept", "left"),
    [
        ("glm4_moe_lite", "mlp_layer_types", [0, 2], ["dense", "sparse"]),
        ("gpt_neo", "attention_layers", [1, 2], ["local", "global"]),
        ("smollm3", "no_rope_layers", [1, 2], [0, 1]),
        ("gemma2", "layer_types", [1], ["full_attention"]),
    ],
)
def test_lists_that_the_code_reads_layer_by_layer_lose_dropped_layers(
    family: str, key: str, kept: list[int], left: list[Any]
) -> None:
    config = config_of(family)
    assert getattr(with_layers(config, 3, kept), key) == left


def test_what_a_model_reads_of_its_lists_tells_them_apart() -> None:
    config = config_of("glm4_moe_lite")
    config.unread, config.eos_token_id = [7, 8, 9], [2, 3, 4]
    assert read_by_layer(config, 3, ["mlp_layer_types", "unread"]) == {"mlp_layer_types"}
    assert set(lists_over_layers(config, 3)) == {"mlp_layer_types", "layer_types"} & vars(config).keys()


def test_a_changed_buffer_has_the_teachers_number_beside_the_students() -> None:
    """Where layer 0 is dropped, what layer 2 had is layer 1's: read under the student's name it would be another's."""
    captured = capture(tiny_config("llama"))
    name = "model.layers.{}.self_attn.scale"
    teacher = {name.format(i): torch.tensor(float(i + 1)) for i in range(3)}
    student = {name.format(0): torch.tensor(2.0), name.format(1): torch.tensor(6.0)}
    assert changed_buffers(captured, teacher, student, {1: 0, 2: 1}) == {name.format(1): name.format(2)}


def test_a_capture_leaves_nothing_in_the_cache_of_fake_tensors() -> None:
    """Else a process that compiles one spec after another grows with each."""
    capture(tiny_config("llama", num_hidden_layers=5))
    assert FakeTensorMode.cache_info().size == 0
