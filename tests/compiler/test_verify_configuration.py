"""The `configuration` check: keys that were changed between the teacher's folder and the student's are named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from minitron.compiler.capture.layer_config import with_layers
from minitron.compiler.compile import config_widths
from minitron.compiler.verify.configuration import Planned, first_other_key, first_other_setting
from tests.foundry import Build, Foundry

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def build(foundry: Foundry) -> Build:
    """Of a teacher whose layers take turns with a window."""
    return foundry.build(foundry.teacher("gemma2"), {"hidden_size": 24, "layers": {"drop": [1]}}, program=False)


def planned(build: Build, config: Any = None) -> Planned:
    plan = build.plan
    widths = config_widths(plan.teacher, plan.targets, plan.config)
    return Planned(plan.teacher.captured, config or plan.config, plan.model, plan.layers, widths)


def changed(build: Build, folder: Path, change: Change, name: str = "config.json") -> Path:
    """A copy of student/ without its weights, one file of it changed."""
    shutil.copytree(build.folder / "student", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    return folder


def test_a_right_student_is_not_accused(build: Build) -> None:
    assert first_other_key(build.folder / "student", planned(build)) is None
    assert first_other_setting(build.folder / "student", build.teacher) is None
    assert build.checks["configuration"]["passed"]


def set_to(key: str, value: Any) -> Change:
    return lambda document: document.update({key: value})


WRONG: dict[str, tuple[Change, str]] = {
    "sliding_window": (set_to("sliding_window", 16), "sliding_window is 16, and the student was planned with 8"),
    "no sliding_window": (lambda d: d.pop("sliding_window"), "sliding_window is 4096, and"),
    "layer_types": (
        set_to("layer_types", ["full_attention", "sliding_attention"]),
        r"layer_types is \['full_attention', 'sliding_attention'\], and",
    ),
    "max_position_embeddings": (set_to("max_position_embeddings", 64), "max_position_embeddings is 64, and"),
    "eos_token_id": (set_to("eos_token_id", 3), "eos_token_id is 3, and the student was planned with 2"),
    "tie_word_embeddings": (set_to("tie_word_embeddings", False), "tie_word_embeddings is False, and"),
    "attention_dropout": (set_to("attention_dropout", 0.1), "attention_dropout is 0.1, and"),
    "rope_theta": (
        lambda d: d["rope_parameters"].update(rope_theta=10001.0), r"rope_parameters\.rope_theta is 10001\.0, and",
    ),
    "rope_theta for older loaders": (set_to("rope_theta", 10001.0), "rope_theta is 10001.0, and no key"),
    "rope_scaling for older loaders": (
        set_to("rope_scaling", {"rope_type": "linear", "factor": 2.0}), r"rope_parameters\.factor is 2\.0, and",
    ),
    "torch_dtype for older loaders": (set_to("torch_dtype", "bfloat16"), "torch_dtype is 'bfloat16', and dtype is"),
    "dtype": (set_to("dtype", "bfloat16"), "dtype is 'bfloat16', and the student was planned with 'float32'"),
    "architectures": (set_to("architectures", ["LlamaForCausalLM"]), "architectures is "),
    "a key of no meaning": (set_to("scale_of_mine", 2), "scale_of_mine is 2, and the student was planned with missing"),
    "a width that nobody asked for": (set_to("intermediate_size", 24), "intermediate_size is 24, and"),
    "a value that no class takes": (set_to("num_hidden_layers", "two"), "config.json cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_key_that_was_changed_in_the_folder_is_named(build: Build, tmp_path: Path, name: str) -> None:
    change, words = WRONG[name]
    found = first_other_key(changed(build, tmp_path / "student", change), planned(build))
    assert found is not None and re.search(words, found), found


PLANNED_WRONG: dict[str, tuple[str, Any, str]] = {
    "the window as wide as a width": ("sliding_window", 24, "sliding_window is 24, the teacher's is 8"),
    "fewer positions": ("max_position_embeddings", 64, "max_position_embeddings is 64, the teacher's is 128"),
    "another end": ("eos_token_id", 1, "eos_token_id is 1, the teacher's is 2"),
    "the layers in another order": (
        "layer_types", ["full_attention", "sliding_attention"], "layer_types is ['full_attention', 'sliding_attention']",
    ),
    "an untied head": ("tie_word_embeddings", False, "tie_word_embeddings is False, the teacher's is True"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED_WRONG)
def test_a_key_that_was_planned_wrongly_is_named(build: Build, tmp_path: Path, name: str) -> None:
    """File and plan agree: what was planned is held against the teacher."""
    key, value, words = PLANNED_WRONG[name]
    config = copy.deepcopy(build.plan.config)
    setattr(config, key, value)
    folder = changed(build, tmp_path / "student", set_to(key, value))
    assert words in (first_other_key(folder, planned(build, config)) or "")


def test_generation_settings_are_the_teachers(build: Build, tmp_path: Path) -> None:
    name = "generation_config.json"
    folder = changed(build, tmp_path / "student", set_to("eos_token_id", 7), name)
    assert first_other_setting(folder, build.teacher) == f"{name}: eos_token_id is 7, the teacher's is 2"
    (folder / name).unlink()
    assert "is missing, the teacher's is" in (first_other_setting(folder, build.teacher) or "")
    (folder / name).write_text("{")
    assert f"{name} cannot be read" in (first_other_setting(folder, build.teacher) or "")


def test_token_ids_are_no_list_over_layers() -> None:
    config = LlamaConfig(num_hidden_layers=3, eos_token_id=[2, 3, 4])
    assert with_layers(config, 3, [0, 2]).eos_token_id == [2, 3, 4]
