"""Families beyond the first eight: everything that their configurations have a key for, narrowed in one compile.

docs/architectures.md has every family and axis; benchmarks/architectures.py makes it. Here is one compile of each kind.
"""

from __future__ import annotations

from typing import Any

import pytest

from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.specs.errors import SpecInvalid
from tests.foundry import Build, Foundry, load_model, logits, token_ids
from tests.models import save_teacher
from tests.zoo.configs import config_of

FFN = "intermediate_size"
ALL = {HIDDEN: 24, FFN: 20, HEADS: 2, GROUPS: 1, LAYERS: 2}
# The width of a head is hidden_size / num_attention_heads and nothing else: both go together, and every head has its own key.
IN_PROPORTION = {HIDDEN: 16, FFN: 20, HEADS: 2, LAYERS: 2}
STUDENTS: dict[str, dict[str, int]] = {
    "bitnet": IN_PROPORTION,  # a norm of what the heads yield, which is no zero where a query head is dropped
    "cohere": ALL,  # a norm that takes a mean off first, logits that are scaled
    "gemma3_text": ALL,  # two rotary tables, windows in some layers, norms before and after
    "gpt2": IN_PROPORTION,  # weights that are the other way round, learnt positions
    "granite": ALL,  # factors on embeddings, residuals, scores and logits
    "nemotron": ALL,  # squared ReLU, layer norms of 1 + w, partial rotary
    "olmo2": ALL,  # norms of queries and keys over all heads, norms after
    "opt": IN_PROPORTION,  # a second key that must say the same width
    "smollm3": ALL,  # layers without rotary embeddings
}
OTHER_KEYS = {("gpt2", FFN): "n_inner", ("opt", FFN): "ffn_dim"}


def teacher(foundry: Foundry, family: str) -> Any:
    folder = foundry.root / f"zoo-{family}"
    return folder if folder.exists() else save_teacher(folder, config_of(family))


def build(foundry: Foundry, family: str) -> Build:
    return foundry.build(teacher(foundry, family), STUDENTS[family], program=False)


@pytest.mark.parametrize("family", STUDENTS)
def test_all_axes_together(foundry: Foundry, family: str) -> None:
    made, wanted = build(foundry, family), STUDENTS[family]
    assert all(check["passed"] for check in made.checks.values())
    widths = made.document("plan.json")["student"]["widths"]
    assert {axis: widths[axis] for axis in wanted} == wanted
    config = load_model(made.folder / "student").config
    for axis, width in wanted.items():
        assert getattr(config, OTHER_KEYS.get((family, axis), axis)) == width


def test_a_norm_that_takes_a_mean_off_has_a_masked_reference_too(foundry: Foundry) -> None:
    """`approximate` speaks of the function, which is not the masked teacher's; the check takes statistics of what is kept."""
    made = build(foundry, "cohere")
    assert {one["axis"]: one["status"] for one in made.document("plan.json")["axes"]}[HIDDEN] == "approximate"
    assert made.checks["masked"]["exact"] and build(foundry, "olmo2").checks["masked"]["exact"]


def test_lists_over_layers_follow_the_layers(foundry: Foundry) -> None:
    made = build(foundry, "smollm3")
    kept = made.document("plan.json")["selection"][LAYERS][0]
    assert made.config["no_rope_layers"] == [[1, 0, 1][layer] for layer in kept]


def test_a_second_key_of_the_same_width_is_found_by_the_shapes(foundry: Foundry) -> None:
    assert build(foundry, "opt").config["word_embed_proj_dim"] == 16


@pytest.mark.parametrize("axis", [HIDDEN, HEADS])
def test_a_derived_head_width_is_refused_with_what_would_work(foundry: Foundry, axis: str) -> None:
    with pytest.raises(SpecInvalid, match=r"32 / 4: narrow both in that proportion"):
        foundry.plan(teacher(foundry, "gpt2"), {axis: {HIDDEN: 24, HEADS: 2}[axis]})


# A scan in chunks does other things for other numbers of tokens: its graph is of one number.


@pytest.fixture(scope="module")
def of_one_length(foundry: Foundry) -> Build:
    return foundry.build(teacher(foundry, "nemotron_h"), {HIDDEN: 24, FFN: 20, HEADS: 2, GROUPS: 1})


def test_a_graph_of_one_length_is_narrowed_and_verified(of_one_length: Build) -> None:
    assert all(check["passed"] for check in of_one_length.checks.values())
    assert of_one_length.checks["masked"]["exact"] and of_one_length.checks["program"]["exact"]


def test_the_plan_says_that_its_graph_is_of_one_length(of_one_length: Build) -> None:
    remarks = of_one_length.document("plan.json")["remarks"]
    assert [one for one in remarks if "its graph is of 48" in one]


def test_the_student_reads_any_number_of_tokens_all_the_same(of_one_length: Build) -> None:
    assert logits(load_model(of_one_length.folder / "student"), token_ids(1, 11)).shape[1] == 11


def test_a_value_that_the_code_makes_is_written_into_the_graph(foundry: Foundry) -> None:
    """A mask's least number: neither the weight files nor the tables of the model have it."""
    made = foundry.build(teacher(foundry, "gpt_neo"), {HIDDEN: 16, FFN: 20, HEADS: 2, LAYERS: 2})
    assert all(check["passed"] for check in made.checks.values())


def test_an_index_that_the_code_makes_is_a_slice(foundry: Foundry) -> None:
    """Keys and values are taken out of one projection by number."""
    made = foundry.build(teacher(foundry, "falcon"), {HIDDEN: 16, FFN: 20, HEADS: 2}, program=False)
    assert all(check["passed"] for check in made.checks.values())


def test_a_layer_that_scales_the_residual_stream_is_passed_by_all_the_same(foundry: Foundry) -> None:
    """With all its weights at zero it would end the stream: the reference passes it by instead."""
    made = foundry.build(teacher(foundry, "doge"), {LAYERS: 2}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    axes = {one["axis"]: one for one in made.document("plan.json")["axes"]}
    assert "rescales the residual stream" in axes[LAYERS]["reason"]
    assert made.checks["masked"]["exact"] and made.checks["masked"]["tolerance"] > 0


def test_one_key_for_feed_forward_layers_and_experts_narrows_both(foundry: Foundry) -> None:
    made = foundry.build(teacher(foundry, "cohere2_moe"), {FFN: 20}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    axes = {one["axis"]: one for one in made.document("plan.json")["axes"]}
    assert axes["moe_intermediate_size"]["student"] == 20
    assert axes["moe_intermediate_size"]["reason"].startswith("follows intermediate_size")


def test_what_follows_must_be_possible_as_well(foundry: Foundry) -> None:
    """Torch multiplies the rows of experts only in whole units, whoever asked for their width."""
    with pytest.raises(
        SpecInvalid,
        match=r"rows of 18 channels: grouped_mm needs rows of a multiple of 16 bytes; write a multiple of 4",
    ):
        foundry.plan(teacher(foundry, "cohere2_moe"), {FFN: 18})


def test_a_view_that_needs_a_copy_with_another_kernel(foundry: Foundry) -> None:
    """The graph is traced with tensors that lie in memory as another kernel's do."""
    made = foundry.build(teacher(foundry, "afmoe"), {FFN: 20, "moe_intermediate_size": 16}, program=False)
    assert all(check["passed"] for check in made.checks.values())
