"""Students against the masked teacher on transformers' own modules (`tests.masked`), which shares no code with the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.foundry import Build, Foundry, token_ids
from tests.masked import Masked, folder_model, logits_of
from tests.models import save_teacher
from tests.zoo.configs import config_of

HIDDEN, FFN, HEADS, GROUPS, LAYERS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
)  # fmt: skip
EXPERTS, EXPERT_WIDTH, SHARED = "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"
DENSE = {HIDDEN: 24, FFN: 24, HEADS: 2, GROUPS: 1, LAYERS: 2}
MIXED = {HIDDEN: 24, EXPERTS: 3, EXPERT_WIDTH: 16, HEADS: 2, GROUPS: 1, LAYERS: 2}
NEOX = {"attention": "dense", "neurons": "dense_4h_to_h", "layers_at": "gpt_neox.layers"}
# Norms by root mean square and by mean and variance, before and behind the blocks, over heads and over all of them; windows;
# fused projections; blocks in parallel; routers of every kind.
CASES: dict[str, tuple[dict[str, int], dict[str, str]]] = {
    "llama": (DENSE, {}),
    "mistral": (DENSE, {}),
    "gemma2": (DENSE, {}),
    "qwen3": (DENSE, {}),
    "phi3": (DENSE, {}),
    "olmo2": (DENSE, {}),
    "cohere": (DENSE, {}),
    "nemotron": (DENSE, {}),
    "gpt_neox": ({HIDDEN: 24, HEADS: 3, FFN: 24, LAYERS: 2}, NEOX),
    "mixtral": ({HIDDEN: 24, EXPERTS: 3, FFN: 24, GROUPS: 1, LAYERS: 2}, {}),
    "qwen2_moe": (MIXED | {SHARED: 12}, {}),
    "gpt_oss": ({HIDDEN: 24, EXPERTS: 3, FFN: 24, GROUPS: 1, LAYERS: 2}, {}),
    "deepseek_v3": ({HIDDEN: 24, EXPERT_WIDTH: 16, FFN: 24, HEADS: 2, LAYERS: 2}, {}),
}
# Sums of fp32 in another order, over the largest logit of a row.
EQUAL = 3e-5
LENGTH = 48  # longer than every window


def build_of(foundry: Foundry, family: str) -> Build:
    teacher = foundry.root / f"masked-{family}"
    if not teacher.exists():
        save_teacher(teacher, config_of(family))
    return foundry.build(teacher, CASES[family][0], program=False)


def masked_teacher(build: Build, family: str, **changes: Any) -> Masked:
    selection = build.document("plan.json")["selection"] | changes
    return Masked(folder_model(build.teacher), selection, **CASES[family][1])


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, over the largest logit of its row."""
    return float(((one - other).abs().amax(-1) / other.abs().amax(-1)).max())


@pytest.mark.parametrize("family", CASES)
def test_a_student_is_its_masked_teacher(foundry: Foundry, family: str) -> None:
    build = build_of(foundry, family)
    windows = [getattr(folder_model(build.teacher).config, "sliding_window", None) or 0]
    assert max(windows) < LENGTH
    teacher, student = masked_teacher(build, family), folder_model(build.folder / "student")
    ids = token_ids(4, LENGTH)
    assert differs(logits_of(student, ids), teacher.logits(ids)) < EQUAL
    experts = build.document("plan.json")["selection"].get(EXPERTS)
    for place, (_, reached) in enumerate(sorted(teacher.reached.items())):
        if experts is not None:
            assert reached == set(experts[place]), "every kept expert is sent tokens, and no other"


@pytest.mark.parametrize(
    ("family", "axis"), [("llama", HIDDEN), ("cohere", FFN), ("olmo2", HEADS), ("mixtral", EXPERTS)]
)
def test_another_selection_is_another_function(foundry: Foundry, family: str, axis: str) -> None:
    """The reference can tell: with one kept index exchanged it is no longer the student."""
    build = build_of(foundry, family)
    whole = {HIDDEN: 32, FFN: 40, HEADS: 4, EXPERTS: 4}[axis]
    (first, *rest) = build.document("plan.json")["selection"][axis]
    other = next(index for index in range(whole) if index not in first)
    changed = masked_teacher(build, family, **{axis: [[*first[:-1], other], *rest]})
    ids = token_ids(2, LENGTH)
    assert differs(logits_of(folder_model(build.folder / "student"), ids), changed.logits(ids)) > 10 * EQUAL
