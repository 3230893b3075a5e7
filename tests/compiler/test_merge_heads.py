"""`recovery.merge_heads`: what a dropped head differs in is folded into a kept one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minitron.compiler.recovery.merged_weights import MergedWeights, pair_heads
from minitron.compiler.verify_build import verify_build
from minitron.compiler.weights.source import open_weights
from minitron.specs.errors import SpecInvalid
from minitron.specs.progress import Silent
from tests.foundry import Build, Foundry

MERGE = {"merge_heads": True}


def multi_head(foundry: Foundry, family: str, **changes: Any) -> Path:
    """A teacher of six heads, each with keys and values of its own."""
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    return foundry.teacher(family, num_hidden_layers=2, **shape | changes)


def compiled(foundry: Foundry, family: str, **more: Any) -> Build:
    student = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return foundry.build(multi_head(foundry, family), student, recovery=more or MERGE)


def test_the_nearest_of_the_kept_takes_the_best_of_the_dropped() -> None:
    scores = np.array([[5.0], [9.0], [1.0], [7.0], [3.0], [8.0]], dtype=np.float32)
    assert pair_heads(scores, np.array([0, 1, 3, 5])) == [(0, 4), (3, 2)]
    assert pair_heads(scores, np.array([1, 5])) == [(5, 3), (1, 0)], "two take in two, the rest are gone"


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_students_heads_are_those_of_the_formula(foundry: Foundry, family: str) -> None:
    """Apart and fused: a head that takes in another is twice itself less the other, all others are as they were."""
    build = compiled(foundry, family)
    assert all(check["passed"] for check in build.checks.values())
    assert build.checks["masked"]["exact"]
    teacher, scores = load_file(build.teacher / "model.safetensors"), build.tensors_of("scores.safetensors")
    for layer in range(2):
        kept = build.document("plan.json")["selection"]["num_attention_heads"][layer]
        pairs = dict(pair_heads(scores[f"num_attention_heads.{layer}"].numpy(), np.array(kept)))
        assert len(pairs) == 2
        attention = f"model.layers.{layer}.self_attn"
        fused = [(f"{attention}.qkv_proj.weight", 3)] if family == "phi3" else []
        for name, parts in fused or [(f"{attention}.{part}_proj.weight", 1) for part in "qkv"]:
            before = teacher[name].reshape(parts, 6, 8, 48)
            check(before, build.tensors[name].reshape(parts, 4, 8, 48), kept, pairs)
        columns = teacher[f"{attention}.o_proj.weight"].T.reshape(1, 6, 8, 48)
        check(columns, build.tensors[f"{attention}.o_proj.weight"].T.reshape(1, 4, 8, 48), kept, pairs)


def check(before: torch.Tensor, after: torch.Tensor, kept: list[int], pairs: dict[int, int]) -> None:
    """Compares [parts, heads, width, channels] of teacher and student."""
    for place, head in enumerate(kept):
        own = before[:, head]
        torch.testing.assert_close(after[:, place], 2 * own - before[:, pairs[head]] if head in pairs else own)


def test_interleaved_with_biases(foundry: Foundry) -> None:
    """Of a teacher whose fused weight has query, key and value of a head one behind the other."""
    plan = foundry.whole("gpt_neox", num_hidden_layers=2)
    teacher, source = plan.teacher, open_weights(plan.teacher.captured, plan.checkpoint)
    merged = MergedWeights(source, teacher.table, teacher.roles.heads, {1: [(0, 3)]})
    for layer, changed in ((0, False), (1, True)):
        prefix = f"gpt_neox.layers.{layer}.attention"
        for name in (f"{prefix}.query_key_value.weight", f"{prefix}.query_key_value.bias", f"{prefix}.dense.weight"):
            before, after = source.get(name), merged.get(name)
            before, after = (one.T if "dense" in name else one for one in (before, after))
            before, after = before.reshape(4, -1), after.reshape(4, -1)
            torch.testing.assert_close(after[0], 2 * before[0] - before[3] if changed else before[0])
            assert torch.equal(after[1:], before[1:])
    bias = "gpt_neox.layers.1.attention.dense.bias"
    assert torch.equal(merged.get(bias), source.get(bias)), "it belongs to no head"


def test_on_the_rotated_teacher_and_verified_again(foundry: Foundry, tmp_path: Path) -> None:
    student = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    importance = {"data": foundry.calibration, "hidden_basis": "principal"}
    loaded = foundry.load(multi_head(foundry, "llama"), student, importance=importance, recovery=MERGE)
    build = foundry.compile(loaded, tmp_path / "build")
    assert build.checks["rotation"]["passed"] and build.checks["masked"]["exact"]
    with foundry.shortened():
        verify_build(build.folder, device="cpu", progress=Silent())
    assert {"weights", "selection", "rotation"} <= Build(build.folder, loaded, build.plan).checks.keys()


def test_merging_is_another_student(foundry: Foundry) -> None:
    merged, plain = compiled(foundry, "llama"), compiled(foundry, "llama", merge_heads=False)
    assert merged.document("plan.json")["fingerprint"] != plain.document("plan.json")["fingerprint"]


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_heads_that_share_keys_and_values(foundry: Foundry) -> None:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(foundry.teacher("llama"), {"num_attention_heads": 2}, recovery=MERGE)
    (error,) = caught.value.errors
    assert error.path == "recovery.merge_heads" and error.hint == "write false or leave it out"
    assert error.message.startswith("2 query heads of this llama share the keys and values of a group: a dropped head")


def test_a_refit_would_undo_it(foundry: Foundry) -> None:
    with pytest.raises(
        SpecInvalid, match=r"recovery\.merge_heads: `refit` fits the projections to what .* undoes what is"
    ):
        foundry.load(multi_head(foundry, "llama"), {"hidden_size": 24}, recovery={**MERGE, "refit": "least_squares"})


def test_no_head_is_dropped(foundry: Foundry) -> None:
    plan = foundry.plan(multi_head(foundry, "llama"), {"intermediate_size": 24}, recovery=MERGE)
    assert not plan.merges
    assert any(one.startswith("merge_heads changes nothing here") for one in plan.remarks)
