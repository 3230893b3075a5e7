"""Families of less usual build: each right, or refused in the plan in words that an engineer understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron.compiler.capture.capture import capture
from minitron.compiler.capture.load_effects import written_on_load
from minitron.compiler.capture.models import build_meta
from minitron.compiler.roles.analysed import analyse_teacher
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS, MOE_INTERMEDIATE, NUM_EXPERTS
from minitron.specs.errors import SpecInvalid
from tests.foundry import Build, Foundry
from tests.models import save_teacher
from tests.zoo.anything import tiny
from tests.zoo.configs import EVERY, config_of

FFN = "intermediate_size"


def teacher(foundry: Foundry, family: str) -> Path:
    folder = foundry.root / "".join(character for character in f"unusual-{family}" if character not in "() ")
    if not folder.exists():
        save_teacher(folder, config_of(family) if family in EVERY else tiny(family))
    return folder


RIGHT: list[tuple[str, dict[str, Any]]] = [
    # The key says twice the width, and the model's code divides it.
    ("recurrent_gemma", {FFN: 10}),
    ("opt (factored embedding)", {HIDDEN: 36, HEADS: 3, FFN: 24}),
    ("falcon (new decoder)", {HIDDEN: 16, HEADS: 2, GROUPS: 1, FFN: 24}),
    ("bart", {FFN: 24, LAYERS: 1}),
    ("lfm2_moe", {HIDDEN: 24, NUM_EXPERTS: 3, MOE_INTERMEDIATE: 16, "layers": {"drop": [2]}}),
    ("zaya", {HIDDEN: 24, MOE_INTERMEDIATE: 16}),
    # Sparse attention picks the best of the earlier tokens; many are scored 0, and the cache decides which of these come first.
    ("deepseek_v32", {MOE_INTERMEDIATE: 16}),
    # The configuration's class computes a key of another part from hidden_size.
    ("moshi", {HIDDEN: 24}),
]


@pytest.mark.parametrize(("family", "student"), [pytest.param(*one, id=one[0]) for one in RIGHT])
def test_a_family_is_narrowed(foundry: Foundry, family: str, student: dict[str, Any]) -> None:
    build: Build = foundry.build(teacher(foundry, family), student, program=False)
    assert build.document("verification.json")["passed"]
    widths = build.document("plan.json")["student"]["widths"]
    wanted = {axis: width for axis, width in student.items() if axis != "layers"}
    assert {axis: widths[axis] for axis in wanted} == wanted


def test_an_embedding_narrower_than_the_stream_keeps_its_width(foundry: Foundry) -> None:
    family = "opt (factored embedding)"
    build = foundry.build(teacher(foundry, family), dict(RIGHT)[family], program=False)
    assert build.config["hidden_size"] == 36 and build.config["word_embed_proj_dim"] == 24
    assert build.tensors["model.decoder.project_in.weight"].shape == (36, 24)
    assert build.plan.teacher.roles.hidden.size == 48, "not the 24 of the embedding"


def test_the_decoder_of_a_pair_has_layers_of_its_own(foundry: Foundry) -> None:
    """The configuration's num_hidden_layers is that of the encoder, which the model does not have."""
    build = foundry.build(teacher(foundry, "bart"), {FFN: 24, LAYERS: 1}, program=False)
    assert config_of("bart").num_hidden_layers == 3 and build.plan.teacher.captured.layer_count == 2
    assert build.config["decoder_layers"] == 1 and build.config["decoder_ffn_dim"] == 24
    with pytest.raises(SpecInvalid, match="narrow both in that proportion"):
        foundry.plan(teacher(foundry, "bart"), {HEADS: 2})


def test_layers_that_read_the_keys_of_another_keep_its_groups(foundry: Foundry) -> None:
    """The last two layers have no keys and values of their own; each has a selection of its own in plan.json."""
    config = tiny(
        "gemma3n_text", num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    made = foundry.build(save_teacher(foundry.root / "shared-keys", config), {GROUPS: 1}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    groups = made.document("plan.json")["selection"][GROUPS]
    assert groups[2] == groups[0] and groups[3] == groups[1]


def test_a_width_that_is_computed_from_its_key(foundry: Foundry) -> None:
    """Two thirds of the key, rounded up to a multiple of 8: as published checkpoints of this family have it."""
    keys = {"block_auto_adjust_ff_dim": True, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"]}
    config = tiny("lfm2", num_hidden_layers=2, hidden_size=32, intermediate_size=60, vocab_size=96, **keys)
    made = foundry.build(save_teacher(foundry.root / "computed", config), {FFN: 24}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    assert made.tensors["model.layers.0.feed_forward.w1.weight"].shape == (24, 32)
    assert made.config["intermediate_size"] == 36 and made.config["block_auto_adjust_ff_dim"]


def test_mixers_that_a_model_has_none_of_follow_its_configuration(foundry: Foundry) -> None:
    """The class holds the heads of mixers against hidden_size, whether or not a layer has one."""
    config = tiny(
        "granitemoehybrid", layer_types=["attention"] * 3, num_hidden_layers=3, num_local_experts=0, mamba_n_heads=8,
        mamba_d_head=8, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, shared_intermediate_size=40,
        mamba_expand=2, mamba_n_groups=1, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = foundry.build(save_teacher(foundry.root / "no-mixers", config), {HIDDEN: 16, HEADS: 2}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    assert made.config["mamba_n_heads"] * made.config["mamba_d_head"] == 2 * 16


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "minicpm3",
        {HIDDEN: 24},
        "div in the model multiplies or adds a constant that depends on a narrowed width (2 in the teacher",
    ),
    ("minicpm3", {LAYERS: 2}, "or on how many layers stand before or beside it"),
    (
        "gpt_neox_japanese",
        {"layers": {"keep": [0, 1]}},
        "the configuration of gpt_neox_japanese cannot express these widths: gpt_neox_japanese.layers.1.attention.dense_bias",
    ),
    (
        "modernbert-decoder",
        {LAYERS: 2},
        "from the last hidden state through layer_norm, which the distillation loss does not know",
    ),
    # Of the feed-forward width another key speaks, which was tried; hidden_size is what stands in the way.
    ("whisper", {HIDDEN: 24, FFN: 24}, "32 / 4: narrow both in that proportion"),
    ("bloom", {FFN: 24}, "bloom has no configuration key for intermediate_size"),
    ("rwkv", {HIDDEN: 24}, "a student of these widths could not generate with a cache: "),
    ("zaya", {NUM_EXPERTS: 2}, "the graph does not show which rows each expert takes, so nothing ranks the experts"),
]


@pytest.mark.parametrize(("family", "student", "words"), REFUSED)
def test_a_family_is_refused_in_the_plan(foundry: Foundry, family: str, student: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(teacher(foundry, family), student)
    assert words in str(caught.value)


def test_a_student_that_could_not_generate_is_refused(foundry: Foundry) -> None:
    """The caches of transformers want a layer with attention."""
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(teacher(foundry, "lfm2_moe"), {"layers": {"keep": [0, 2]}})
    assert "a student of these widths could not generate with a cache: `get_seq_length` can only be" in str(
        caught.value
    )


def test_layers_that_can_be_kept_are_kept_when_they_are_named(foundry: Foundry) -> None:
    plan = foundry.plan(teacher(foundry, "gpt_neox_japanese"), {"layers": {"keep": [2, 3]}})
    assert plan.config.num_hidden_layers == 2


def test_a_head_of_which_the_logits_are_a_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that is padded to a round number, whose last rows the model cuts off."""
    from transformers import LlamaForCausalLM

    from minitron.specs.errors import UsageError

    forward = LlamaForCausalLM.forward

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits[..., :90]
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", cut)
    with pytest.raises(UsageError, match=r"the head has 96 rows and the logits are 90 of them \(a padded vocabulary\)"):
        analyse_teacher(capture(config_of("llama")))


def test_a_row_that_is_zero_after_every_load_is_zero_in_the_student(foundry: Foundry) -> None:
    """The code of this family sets the padding token's row of the tied embedding to zero, whatever the file has there."""
    folder = teacher(foundry, "youtu")
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert stored[0].abs().max() > 0.1, "the file has another row"
    build = foundry.build(folder, {HIDDEN: 24, FFN: 24}, program=False)
    assert all(check["passed"] for check in build.checks.values())
    assert (
        not build.tensors["model.embed_tokens.weight"][0].any() and build.tensors["model.embed_tokens.weight"][1].any()
    )
    assert [one for one in build.plan.remarks if "writes to model.embed_tokens.weight each time it is loaded" in one]


def test_what_loading_writes_to_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaPreTrainedModel

    model = build_meta(config_of("llama"), torch.float32, "eager")
    assert written_on_load(model) == set()

    def initialise(self: Any, module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Embedding):
            module.weight.data[3].fill_(1.0)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", initialise)
    assert written_on_load(model) == {"model.embed_tokens.weight"}


def test_widths_without_a_key_are_found_beside_many_that_have_one(foundry: Foundry) -> None:
    """The heads of its scan have the key of the attention's heads; among all keys of the same values it has to be found."""
    student = {HIDDEN: 24, "mamba_num_heads": 2, FFN: 24, MOE_INTERMEDIATE: 16, NUM_EXPERTS: 3}
    plan = foundry.plan(teacher(foundry, "bailing_hybrid"), student)
    assert {axis: plan.targets.widths[axis] for axis in student} == student
