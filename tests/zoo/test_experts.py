"""Mixtures of experts through the whole compiler: how many experts, how wide, and which ones stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.specs.data_files import resolve
from minitron.specs.errors import SpecInvalid
from tests.foundry import CALIBRATION, CHECK_NAMES, Build, Foundry, load_model

EXPERTS, EXPERT_WIDTH, SHARED, FFN = (
    "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size",
)  # fmt: skip
# The keys by which a configuration says what was asked for, where they are not the axes' own.
KEYS = {
    "mixtral": {EXPERTS: "num_local_experts"},
    "gpt_oss": {EXPERTS: "num_local_experts"},
    "deepseek_v3": {EXPERTS: "n_routed_experts"},
    "llama4_text": {EXPERTS: "num_local_experts", EXPERT_WIDTH: FFN, FFN: "intermediate_size_mlp"},
}
ALONE = [
    ("qwen3_moe", {EXPERTS: 4}),
    ("qwen3_moe", {EXPERT_WIDTH: 16}),
    ("qwen3_moe", {HIDDEN: 24}),
    ("qwen3_moe", {GROUPS: 1}),
    ("mixtral", {EXPERTS: 2}),
    ("mixtral", {FFN: 24}),
    ("deepseek_v3", {EXPERTS: 4}),
    ("deepseek_v3", {SHARED: 24}),
]
TOGETHER: dict[str, dict[str, int]] = {
    "qwen3_moe": {EXPERTS: 3, EXPERT_WIDTH: 16, HIDDEN: 24, HEADS: 2, GROUPS: 1, LAYERS: 1},
    "mixtral": {EXPERTS: 3, FFN: 24, HIDDEN: 24, HEADS: 2, GROUPS: 1, LAYERS: 1},
    "qwen2_moe": {EXPERTS: 4, EXPERT_WIDTH: 16, SHARED: 8, HIDDEN: 24, GROUPS: 1},
    "gpt_oss": {EXPERTS: 4, FFN: 24, HIDDEN: 24, GROUPS: 1},
    "deepseek_v3": {EXPERTS: 4, EXPERT_WIDTH: 16, FFN: 24, HIDDEN: 24, HEADS: 2},
    "llama4_text": {EXPERTS: 4, EXPERT_WIDTH: 16, FFN: 24, HIDDEN: 24, GROUPS: 1},
}


def build_of(foundry: Foundry, family: str, student: dict[str, int], dtype: str = "float32", **changes: Any) -> Build:
    teacher = foundry.teacher(family, dtype, **{"num_hidden_layers": 2, **changes})
    return foundry.build(teacher, student, dtype=dtype, program=False)


def check(build: Build, family: str, wanted: dict[str, int]) -> None:
    """Every check has passed, masking among them: the dropped experts are those that the router gives no weight to."""
    assert set(build.checks) == CHECK_NAMES and all(one["passed"] for one in build.checks.values())
    assert build.checks["masked"]["exact"]
    plan = build.document("plan.json")
    assert {axis: plan["student"]["widths"][axis] for axis in wanted} == wanted
    config = AutoConfig.from_pretrained(build.folder / "student")
    for axis, width in wanted.items():
        key = KEYS.get(family, {}).get(axis, axis)
        if axis != SHARED or hasattr(config, key):
            assert getattr(config, key) == width
    stored = sum(tensor.numel() for name, tensor in build.tensors.items() if "correction" not in name)
    assert stored == plan["student"]["parameters"]


def refusal(foundry: Foundry, family: str, student: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(foundry.teacher(family, **{"num_hidden_layers": 2, **changes}), student)
    return str(caught.value)


@pytest.mark.parametrize(("family", "student"), [pytest.param(*one, id="-".join([one[0], *one[1]])) for one in ALONE])
def test_each_axis_alone(foundry: Foundry, family: str, student: dict[str, int]) -> None:
    check(build_of(foundry, family, student), family, student)


@pytest.mark.parametrize("family", TOGETHER)
def test_all_axes_together(foundry: Foundry, family: str) -> None:
    check(build_of(foundry, family, TOGETHER[family]), family, TOGETHER[family])


def test_the_plan_says_what_becomes_of_experts(foundry: Foundry) -> None:
    plan = build_of(foundry, "qwen3_moe", TOGETHER["qwen3_moe"]).document("plan.json")
    (experts,) = (axis for axis in plan["axes"] if axis["axis"] == EXPERTS)
    assert experts["status"] == "exact"
    assert "the router gives no weight to experts that are gone (softmax and topk over those" in experts["reason"]


def test_of_its_experts_a_token_meets_as_many_as_before(foundry: Foundry) -> None:
    """What a token meets does not change with the number of experts, but for the rows of the router."""
    plan = build_of(foundry, "qwen3_moe", {EXPERTS: 4}).document("plan.json")
    teacher, student = plan["teacher"], plan["student"]
    expert, layers = 3 * 32 * 24, 2
    assert teacher["parameters"] - student["parameters"] == layers * 2 * (expert + 32)
    assert teacher["active_parameters"] - student["active_parameters"] == layers * 2 * 32
    assert teacher["parameters"] - teacher["active_parameters"] == layers * (6 - 2) * expert


# -- what the router needs ------------------------------------------------------------------------------------------------


def test_one_expert_is_left_where_the_router_picks_one(foundry: Foundry) -> None:
    build = build_of(foundry, "qwen3_moe", {EXPERTS: 1}, num_experts_per_tok=1, num_hidden_layers=1)
    check(build, "qwen3_moe", {EXPERTS: 1})


@pytest.mark.parametrize(
    ("family", "count", "words"),
    [
        ("qwen3_moe", 1, "1 experts are fewer than the router needs: it sends every token to 2; write at least 2"),
        ("llama4_text", 1, "it sends every token to 2; write at least 2"),
        ("deepseek_v3", 2, "and picks among 2 groups of experts first; write at least 4"),
        ("deepseek_v3", 5, "5 experts do not divide into the 2 groups that the router picks from; write 4 or 6"),
    ],
)
def test_fewer_experts_than_the_router_picks_are_refused(foundry: Foundry, family: str, count: int, words: str) -> None:
    assert words in refusal(foundry, family, {EXPERTS: count})


@pytest.mark.parametrize("axis, width, near", [(EXPERT_WIDTH, 18, "16 or 20"), (HIDDEN, 3, "4")])
def test_rows_that_torch_cannot_multiply_are_refused(foundry: Foundry, axis: str, width: int, near: str) -> None:
    words = refusal(foundry, "qwen3_moe", {axis: width})
    assert f"rows of {width} channels: grouped_mm needs rows of a multiple of 16 bytes; write a multiple of 4" in words
    assert words.endswith(f": {near}")


def test_a_share_of_experts_is_one_that_the_router_can_pick_from(foundry: Foundry) -> None:
    teacher = foundry.teacher("deepseek_v3", num_hidden_layers=2)
    assert foundry.plan(teacher, {EXPERTS: "95%"}).targets.widths[EXPERTS] == 4
    assert foundry.plan(teacher, {EXPERTS: "20%"}).targets.widths[EXPERTS] == 4


def test_each_group_of_experts_keeps_as_many(foundry: Foundry) -> None:
    build = build_of(foundry, "deepseek_v3", {EXPERTS: 4})
    (kept,) = build.document("plan.json")["selection"][EXPERTS]
    assert [expert // 3 for expert in kept] == [0, 0, 1, 1]
    gate = "model.layers.1.mlp.gate"
    bias = build.tensors[f"{gate}.e_score_correction_bias"]
    teacher = load_model(build.teacher).get_submodule(gate)
    assert torch.equal(bias, teacher.e_score_correction_bias[kept])
    assert torch.equal(build.tensors[f"{gate}.weight"], teacher.weight[kept])


def test_a_correction_that_is_kept_in_float32_is_not_rounded(foundry: Foundry) -> None:
    """Routers of this kind tell experts apart by differences that bfloat16 does not have."""
    build = build_of(foundry, "deepseek_v3", {EXPERTS: 4}, dtype="bfloat16")
    assert all(one["passed"] for one in build.checks.values())
    formats = {"correction" in name: tensor.dtype for name, tensor in build.tensors.items()}
    assert formats == {True: torch.float32, False: torch.bfloat16}


# -- shared experts -------------------------------------------------------------------------------------------------------


def test_a_shared_expert_follows_the_width_that_it_is_counted_in(foundry: Foundry) -> None:
    build = build_of(foundry, "deepseek_v3", {EXPERT_WIDTH: 16, EXPERTS: 4})
    assert build.document("plan.json")["student"]["widths"][SHARED] == 2 * 16
    assert build.config["n_shared_experts"] == 2


def test_its_width_alone_changes_how_many_it_counts_as(foundry: Foundry) -> None:
    assert build_of(foundry, "deepseek_v3", {SHARED: 24}).config["n_shared_experts"] == 1
    words = refusal(foundry, "deepseek_v3", {SHARED: 32})
    assert "in units of moe_intermediate_size, which is 24; write 24 or 48, or change moe_intermediate_size" in words
    words = refusal(foundry, "llama4_text", {SHARED: 16})
    assert "always 1 times as wide as moe_intermediate_size, which is 24; leave it out: it follows" in words


# -- layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "kept", "config"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 2], {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 3]}, [1, 2, 3], {"mlp_only_layers": [0, 2]}),
        ("deepseek_v3", {"first_k_dense_replace": 2}, [1, 3], {"first_k_dense_replace": 1}),
        ("llama4_text", {}, [1, 2], {"moe_layers": [0]}),
    ],
)
def test_which_layers_have_experts_follows_dropped_layers(
    foundry: Foundry, family: str, changes: dict[str, Any], kept: list[int], config: dict[str, Any]
) -> None:
    teacher = foundry.teacher(family, num_hidden_layers=4, **changes)
    plan = foundry.plan(teacher, {"layers": {"keep": kept}})
    assert {key: getattr(plan.config, key) for key in config} == config
    assert plan.config.num_hidden_layers == len(kept)


# -- which ones stay ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dispatched(foundry: Foundry) -> tuple[Build, list[Any]]:
    """A build, and what the experts of each of the teacher's layers are given over the calibration samples."""
    build = build_of(foundry, "qwen3_moe", TOGETHER["qwen3_moe"])
    spec = build.loaded.spec
    assert spec.importance.data is not None
    data = resolve(spec.importance.data, build.loaded.folder, at="importance.data")
    size = SampleConfig(spec.importance.data.samples, spec.importance.data.sequence_length)
    samples = calibration_samples(data, load_tokenizer(build.teacher), build.config["vocab_size"], size)
    model = load_model(build.teacher)
    given: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: given.append((module, *inputs)))
    with torch.no_grad():
        model(input_ids=samples, use_cache=False)
    assert all(x.shape[0] == samples.numel() for _, x, *_ in given)
    return build, given


def test_experts_are_ranked_by_what_they_add(dispatched: tuple[Build, list[Any]]) -> None:
    """REAP (arXiv 2510.13999): the mean of |g f(x)| over the tokens that an expert is sent. Worked out expert by expert."""
    build, given = dispatched
    scores, length = build.tensors_of("scores.safetensors"), CALIBRATION["sequence_length"]
    for layer, (module, x, chosen, weights) in enumerate(given):
        added, used = [], []
        for expert in range(6):
            tokens, place = torch.where(chosen == expert)
            gate, up = (x[tokens] @ module.gate_up_proj[expert].T).chunk(2, -1)
            channels = torch.nn.functional.silu(gate) * up
            each = [channels[tokens // length == one].abs().sum(0) / (length * 2) for one in range(len(x) // length)]
            used.append(torch.stack(each).norm(dim=0))
            out = channels @ module.down_proj[expert].T * weights[tokens, place, None]
            added.append(out.norm(dim=-1).mean() if len(tokens) else out.new_zeros(()))
        torch.testing.assert_close(scores[f"{EXPERTS}.{layer}"], torch.stack(added).detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores[f"{EXPERT_WIDTH}.{layer}"], torch.stack(used).detach(), rtol=1e-4, atol=1e-6)


def test_each_expert_keeps_channels_of_its_own(dispatched: tuple[Build, list[Any]]) -> None:
    build, _ = dispatched
    scores, selection = build.tensors_of("scores.safetensors"), build.document("plan.json")["selection"]
    ((layer,),) = selection[LAYERS]
    (experts,), channels = selection[EXPERTS], selection[EXPERT_WIDTH]
    assert experts == sorted(scores[f"{EXPERTS}.{layer}"].topk(3).indices.tolist())
    assert channels == [sorted(scores[f"{EXPERT_WIDTH}.{layer}"][e].topk(16).indices.tolist()) for e in experts]
    assert len({tuple(one) for one in channels}) == 3
    hidden = np.array(selection[HIDDEN][0])
    whole = load_model(build.teacher).model.layers[layer].mlp.experts
    for new, (expert, kept) in enumerate(zip(experts, channels, strict=True)):
        down = whole.down_proj[expert][np.ix_(hidden, kept)]
        name = f"model.layers.0.mlp.experts.{new}.down_proj.weight"
        assert torch.equal(build.tensors[name], down)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int]]:
    """A tiny mixture, odd numbers among them, and a student that its router can work with."""
    experts = draw(st.integers(2, 5))
    picked = draw(st.integers(1, min(experts, 3)))
    width = draw(st.integers(1, 3))
    groups, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    teacher = {
        "num_hidden_layers": 1, "num_experts": experts, "num_experts_per_tok": picked, "moe_intermediate_size": 4 * width,
        "num_key_value_heads": groups, "num_attention_heads": groups * repeats, "head_dim": draw(st.sampled_from([4, 12])),
        "norm_topk_prob": draw(st.booleans()),
    }  # fmt: skip
    student = {
        EXPERTS: draw(st.integers(picked, experts)), EXPERT_WIDTH: 4 * draw(st.integers(1, width)),
        GROUPS: draw(st.integers(1, groups)), HIDDEN: 4 * draw(st.integers(1, 8)),
    }  # fmt: skip
    return teacher, student


@settings(
    max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
@given(mixtures())
def test_any_shape(foundry: Foundry, case: tuple[dict[str, Any], dict[str, int]]) -> None:
    teacher, student = case
    build = build_of(foundry, "qwen3_moe", student, **teacher)
    assert all(one["passed"] for one in build.checks.values())
    assert {axis: build.document("plan.json")["student"]["widths"][axis] for axis in student} == student
