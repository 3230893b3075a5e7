"""The plan's figures are those of the real models, its keys those that other programs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from minitron.compiler import make_plan
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.plan_document import plan_document
from tests.foundry import Build, Foundry, load_model, token_ids
from tests.models import COMMON

WIDTHS = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
LAYERS = {"num_hidden_layers": 1}
# Untied, tied with heads of their own width, experts.
FAMILIES = ["llama", "qwen3", "mixtral"]
EXPERTS, CHOSEN = 4, 2


def build(foundry: Foundry, family: str) -> Build:
    return foundry.build(foundry.teacher(family, num_hidden_layers=2), WIDTHS | LAYERS)


def sides(foundry: Foundry, family: str) -> list[tuple[dict[str, Any], Path]]:
    """What the plan says of teacher and student, and where they are."""
    made = build(foundry, family)
    plan = made.document("plan.json")
    return [(plan["teacher"], made.teacher), (plan["student"], made.folder / "student")]


# -- figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_loaded_model(foundry: Foundry, family: str) -> None:
    for said, folder in sides(foundry, family):
        sizes = {name: parameter.numel() for name, parameter in load_model(folder).named_parameters()}
        assert said["parameters"] == sum(sizes.values())
        ends = [size for name, size in sizes.items() if name in ("model.embed_tokens.weight", "lm_head.weight")]
        assert said["non_embedding_parameters"] == sum(sizes.values()) - sum(ends)
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        assert (experts > 0) == (family == "mixtral")
        assert said["active_parameters"] == sum(sizes.values()) - experts * (EXPERTS - CHOSEN) // EXPERTS


def data_bytes(folder: Path) -> int:
    """What the weight files hold besides their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            total += path.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_are_those_of_the_files(foundry: Foundry, family: str) -> None:
    for said, folder in sides(foundry, family):
        assert said["weight_bytes"] == data_bytes(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_a_token_is_what_generation_holds(foundry: Foundry, family: str) -> None:
    for said, folder in sides(foundry, family):
        with torch.no_grad():
            cache = load_model(folder)(input_ids=token_ids(1, 5), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert said["kv_cache_bytes_per_token"] * 5 == held


def test_the_cache_does_not_depend_on_the_width_of_experts(foundry: Foundry) -> None:
    """Rows of 12 channels cannot be multiplied expert by expert in bfloat16, whatever the model itself is held in."""
    teacher = foundry.teacher("deepseek_v3", num_hidden_layers=2)
    costs = [plan_document(foundry.plan(teacher, {"moe_intermediate_size": width}))["student"] for width in (16, 12)]
    assert costs[0]["kv_cache_bytes_per_token"] == costs[1]["kv_cache_bytes_per_token"] == 4 * 2 * (12 + 4)


@pytest.mark.parametrize("family", ["deepseek_v3", "mistral"])
def test_the_cache_is_what_each_layer_keeps(foundry: Foundry, family: str) -> None:
    """A latent vector instead of keys and values; of a sliding window only its last tokens, the newest beside them."""
    costs = Estimate(foundry.whole(family, num_hidden_layers=2)).teacher_costs
    model = load_model(foundry.teacher(family, num_hidden_layers=2))
    for tokens in (3, 20):
        with torch.no_grad():
            cache = model(input_ids=token_ids(1, tokens), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        full = [layer for layer in costs.cache if layer.window is not None and layer.window <= tokens]
        assert costs.kv_cache_bytes(tokens) == held + sum(layer.elements for layer in full)
        assert (full != []) == (family == "mistral" and tokens == 20)
    assert costs.kv_cache_bytes(3) == 3 * costs.kv_cache_bytes_per_token


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_operations_are_those_that_torch_counts(foundry: Foundry, family: str) -> None:
    """Two for each weight that a token meets, and for each pair of positions what attention adds."""
    for said, folder in sides(foundry, family):
        model = load_model(folder, "eager")
        for length in (1, 6):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(input_ids=token_ids(1, length), use_cache=False)
            pairs = length * length  # eager attention computes those that are masked too
            counted = length * said["flops_per_token"] + pairs * said["attention_flops_per_pair"]
            # The norms' weights are counted as multiplied, and the counter sees matrices only.
            norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
            assert counter.get_total_flops() == counted - 2 * norms * length


# -- the document -------------------------------------------------------------------------------------------------------

SIDE = {
    "parameters", "non_embedding_parameters", "active_parameters", "weight_bytes", "kv_cache_bytes_per_token",
    "flops_per_token",
}  # fmt: skip
DISTILL = {"tokens": "1M", "sequence_length": 64, "global_batch_size": 8}


def whole_plan(foundry: Foundry) -> dict[str, Any]:
    distill = DISTILL | {"data": {"text": [str(foundry.root / "corpus.txt")]}}
    plan = foundry.plan(foundry.teacher("llama", num_hidden_layers=2), WIDTHS | LAYERS, distill=distill)
    return plan_document(plan)


def integers(values: dict[str, Any], keys: set[str]) -> bool:
    return all(type(values[key]) is int and values[key] > 0 for key in keys)


def test_the_keys_of_the_contract(foundry: Foundry) -> None:
    plan = whole_plan(foundry)
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["format_version"] == 1
    assert plan["spec"].keys() >= {"name", "path", "sha256"} and len(plan["spec"]["sha256"]) == 64
    for side in (plan["teacher"], plan["student"]):
        assert side["model_type"] == "llama" and integers(side, SIDE)
        assert set(side["widths"]) == {*WIDTHS, *LAYERS, "head_dim"} and integers(side["widths"], set(side["widths"]))
    axes = {axis["axis"]: axis for axis in plan["axes"]}
    assert set(axes) == set(plan["teacher"]["widths"])
    for name, axis in axes.items():
        assert axis["status"] in ("exact", "approximate", "refused") and axis["reason"]
        assert (axis["teacher"], axis["student"]) == (plan["teacher"]["widths"][name], plan["student"]["widths"][name])
    for name, width in (WIDTHS | LAYERS).items():
        assert (axes[name]["teacher"], axes[name]["student"]) == (COMMON[name] if name in WIDTHS else 2, width)
    assert [phase["name"] for phase in plan["phases"]] == ["calibrate", "distill"]
    for phase in plan["phases"]:
        assert integers(phase, {"tokens", "flops", "peak_memory_bytes"}) and phase["device_hours"] >= 0
    distill = plan["spec"]["resolved"]["distill"]
    step = distill["sequence_length"] * distill["global_batch_size"]
    assert plan["phases"][0]["tokens"] == 6 * 48
    assert plan["phases"][1]["tokens"] == -(-1_000_000 // step) * step, "whole steps, as training takes them"
    assert "selection" not in plan, "which is not made yet"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_selection_has_a_list_for_the_network_or_for_each_layer(foundry: Foundry, family: str) -> None:
    selection = build(foundry, family).document("plan.json")["selection"]
    widths = {"num_hidden_layers": 2, **{name: COMMON[name] for name in WIDTHS}}
    assert selection.keys() == widths.keys()
    for name, lists in selection.items():
        # The channels of a mixture's experts differ from expert to expert.
        assert len(lists) == (4 if family == "mixtral" and name == "intermediate_size" else 1)
        for kept in lists:
            assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < widths[name]
            assert len(kept) == (WIDTHS | LAYERS)[name]
    (heads,), (groups,) = selection["num_attention_heads"], selection["num_key_value_heads"]
    assert {head // 2 for head in heads} == set(groups), "query heads of the groups that stay"


def test_the_configuration_alone_gives_the_same_plan_and_says_what_was_not_looked_at(
    foundry: Foundry, tmp_path: Path
) -> None:
    with_weights = plan_document(foundry.plan(foundry.teacher("llama", num_hidden_layers=2), WIDTHS | LAYERS))
    (tmp_path / "teacher").mkdir()
    shutil.copy(foundry.teacher("llama", num_hidden_layers=2) / "config.json", tmp_path / "teacher")
    loaded = foundry.load(tmp_path / "teacher", WIDTHS | LAYERS)
    with foundry.shortened():
        plan = plan_document(make_plan(loaded, build=tmp_path / "build"))
    for key in ("student", "axes", "phases"):
        assert plan[key] == with_weights[key]
    assert with_weights["remarks"] == []
    assert plan["remarks"] == [
        "no weight files are there: tensor names and shapes could not be compared with the configuration",
        "no tokenizer files are there: they could not be compared with the vocabulary",
    ]
    assert not (tmp_path / "build").exists(), "a preview writes nothing"


def test_tensors_that_are_not_the_models_are_told_of(foundry: Foundry, tmp_path: Path) -> None:
    """Published checkpoints hold tables that older versions saved."""
    from safetensors.torch import load_file, save_file

    teacher = foundry.teacher("llama", num_hidden_layers=2)
    shutil.copytree(teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    remarks = plan_document(foundry.plan(tmp_path / "teacher", WIDTHS | LAYERS))["remarks"]
    assert remarks == [
        "2 tensors of the checkpoint are not the model's and are ignored, such as "
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    ]
    with safe_open(path, framework="pt") as handle:
        assert len(handle.keys()) == len(load_file(teacher / "model.safetensors")) + 2
