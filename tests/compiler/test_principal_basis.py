"""`importance.hidden_basis: principal` and `importance.untie`: what is rotated, what comes out, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from minitron.compiler.recovery import tied
from minitron.compiler.recovery.rotated_weights import principal_basis
from minitron.compiler.recovery.tied import fit_tied, token_shares
from minitron.specs.errors import SpecInvalid
from tests.foundry import Build, Foundry, load_model, logits, teacher_model, token_ids
from tests.models import COMMON, save_teacher, tiny_config

NARROW = {"hidden_size": 24}


def principal(foundry: Foundry, **more: Any) -> dict[str, Any]:
    return {"data": foundry.calibration, "hidden_basis": "principal", **more}


def compiled(foundry: Foundry, family: str, dtype: str = "float32", untie: bool = False, **changes: Any) -> Build:
    teacher = foundry.teacher(family, dtype, **changes)
    more = {"untie": True} if untie else {}
    return foundry.build(teacher, NARROW, program=False, dtype=dtype, importance=principal(foundry, **more))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("phi3", {}),  # fused projections
        ("qwen3", {}),  # a tied head
        ("gpt_oss", {"num_hidden_layers": 2}),  # experts with biases
    ],
)
def test_rotation_changes_no_logit_and_pruning_is_masking(
    foundry: Foundry, family: str, changes: dict[str, Any]
) -> None:
    build = compiled(foundry, family, **changes)
    assert build.checks["rotation"]["exact"] and build.checks["rotation"]["max_error"] < 1e-5
    assert build.checks["masked"]["exact"] and build.checks["reload"]["passed"]
    assert build.config["hidden_size"] == 24
    assert build.document("plan.json")["selection"]["hidden_size"] == [list(range(24))]


def test_norms_of_one_and_a_weight_and_a_scaled_embedding(foundry: Foundry, tmp_path: Path) -> None:
    """Norms multiply by 1 + w, the embedding by sqrt(hidden_size), which the student computes of its own width; tied."""
    config = AutoConfig.for_model("gemma", **COMMON | {"num_hidden_layers": 2, "head_dim": 8})
    teacher = save_teacher(tmp_path / "teacher", config)
    build = foundry.build(teacher, NARROW, program=False, importance=principal(foundry))
    assert build.checks["rotation"]["passed"] and build.checks["masked"]["exact"]
    norm = build.tensors["model.layers.0.input_layernorm.weight"]
    assert norm.unique().numel() == 1 and abs(float(norm[0])) < 0.2  # the teacher multiplies by about one


def test_projections_keep_their_size_where_norm_weights_are_small(foundry: Foundry, tmp_path: Path) -> None:
    """Norm weights of a tenth, as large models have them: folded whole, projections would be a tenth as large, and a learning
    rate that suits the teacher would tear the student apart."""
    teacher = save_teacher(tmp_path / "teacher", tiny_config("llama", num_hidden_layers=2))
    path = teacher / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if "norm" in name]:
        weights[name] = 0.1 + 0.05 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, path, metadata={"format": "pt"})
    build = foundry.build(teacher, NARROW, program=False, importance=principal(foundry))
    assert build.checks["rotation"]["passed"] and build.checks["masked"]["exact"]

    def size(tensors: Mapping[str, torch.Tensor], name: str) -> float:
        return float(tensors[name].float().square().mean().sqrt())

    for name in weights:
        if "layers" in name:
            assert size(build.tensors, name) == pytest.approx(size(weights, name), rel=0.5), name
        if "layernorm" in name:
            assert build.tensors[name].unique().numel() == 1


def test_a_teacher_in_bfloat16(foundry: Foundry) -> None:
    build = compiled(foundry, "llama", "bfloat16", num_hidden_layers=2)
    assert build.checks["rotation"]["passed"] and build.checks["masked"]["exact"]
    assert {tensor.dtype for tensor in build.tensors.values()} == {torch.bfloat16}


def flat_teacher(folder: Path, width: int, rank: int) -> Path:
    """A teacher whose residual stream lies in `rank` of its dimensions, none of them a channel."""
    save_teacher(folder, tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=False, rms_norm_eps=1e-12))
    path = folder / "model.safetensors"
    weights = load_file(path)
    mix = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0][:, :rank]
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weights[name] = mix @ mix.T @ weight
        elif "embed_tokens" in name:
            weights[name] = weight @ mix @ mix.T
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_dimensions_that_the_stream_does_not_use_cost_nothing(foundry: Foundry, tmp_path: Path) -> None:
    """All 32 channels are in use, and the student has 24: with each norm's mean taken over 32 it is the teacher."""
    teacher = flat_teacher(tmp_path / "teacher", 32, 24)
    build = foundry.build(teacher, NARROW, program=False, importance=principal(foundry))
    student, ids = load_model(build.folder / "student"), token_ids()
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "norm" in name:
                weight.mul_((32 / 24) ** 0.5)
    torch.testing.assert_close(logits(student, ids), logits(teacher_model(build.plan), ids), rtol=1e-3, atol=1e-3)


def test_scores_with_a_covariance_serve_every_basis(foundry: Foundry, tmp_path: Path) -> None:
    """It is taken once it is asked for."""
    from tests.compiler.test_compile import Words

    teacher = foundry.teacher("qwen3", num_hidden_layers=2)
    words = Words()
    rotated = {"hidden_basis": "principal"}
    for importance, calibrated in (({}, 1), (rotated, 2), (rotated | {"untie": True}, 2), ({}, 2)):
        loaded = foundry.load(teacher, NARROW, importance={"data": foundry.calibration, **importance})
        foundry.compile(loaded, tmp_path, words, program=False)
        assert words.tasks.count("calibrate") == calibrated
        found = load_file(tmp_path / "scores.safetensors")
        assert ("covariance.hidden" in found) == (calibrated == 2)


# -- tied heads ----------------------------------------------------------------------------------------------------------


def test_an_untied_head_has_its_price_and_a_matrix_of_its_own(foundry: Foundry) -> None:
    build = compiled(foundry, "qwen3", untie=True, num_hidden_layers=2)
    assert build.config["tie_word_embeddings"] is False
    assert build.tensors["lm_head.weight"].shape == build.tensors["model.embed_tokens.weight"].shape == (96, 24)
    assert build.checks["rotation"]["passed"] and build.checks["masked"]["exact"]
    plan = build.document("plan.json")
    assert plan["student"]["parameters"] == sum(tensor.numel() for tensor in build.tensors.values())
    assert plan["teacher"]["parameters"] == sum(p.numel() for p in teacher_model(build.plan).parameters())
    (remark,) = (one for one in plan["remarks"] if "untie" in one)
    assert f"{96 * 24:,} parameters" in remark
    heads = list(build.plan.heads.values())
    assert [head.weight for head in heads] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_untied_and_otherwise_as_it_was(foundry: Foundry) -> None:
    """Without another basis both matrices are the teacher's one."""
    teacher = foundry.teacher("qwen3", num_hidden_layers=2)
    importance = {"data": foundry.calibration, "untie": True}
    build = foundry.build(teacher, NARROW, program=False, importance=importance)
    torch.testing.assert_close(build.tensors["lm_head.weight"], build.tensors["model.embed_tokens.weight"])


def test_a_tied_head_is_told_of_what_untying_costs(foundry: Foundry) -> None:
    build = compiled(foundry, "qwen3")
    assert "lm_head.weight" not in build.tensors and build.config["tie_word_embeddings"] is True
    (remark,) = (one for one in build.document("plan.json")["remarks"] if "untie" in one)
    assert f"importance.untie: true gives the head its own, {96 * 24:,} parameters" in remark


def test_one_matrix_for_both_uses() -> None:
    """Where the norm's weight is one number, the two matrices differ by it alone; else the fit is better than either."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 12, generator=generator)
    rows = torch.randn(200, 12, generator=generator) @ torch.diag(torch.linspace(2, 0.1, 12))
    gram, shares = (rows.T @ rows).double() / 200, token_shares(torch.arange(40), 40)
    fit = fit_tied(table, 1.7 * table, gram, shares, 12)
    torch.testing.assert_close(fit.matrix, table, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.weight, torch.full((12,), 1.7), rtol=1e-3, atol=1e-3)

    head = table * torch.linspace(0.5, 2, 12)
    fit = fit_tied(table, head, gram, shares, 8)

    def head_error(matrix: torch.Tensor) -> float:
        return float(((rows[:, :8] @ matrix.T - rows @ head.T) ** 2).mean())

    assert head_error(fit.matrix * fit.weight) < head_error(table[:, :8])
    assert float((fit.matrix - table[:, :8]).square().mean()) < float((head[:, :8] - table[:, :8]).square().mean())


class LargestDouble(TorchDispatchMode):
    """Notes the largest number of elements of any tensor in float64 that an operation yields."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_vocabulary_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks it is what it is in one, and no tensor of the vocabulary's size is in float64."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1000, 12, generator=generator)
    head = table * torch.linspace(0.5, 2, 12)
    rows = torch.randn(200, 12, generator=generator)
    given = (table, head, (rows.T @ rows).double() / 200, token_shares(torch.arange(1000), 1000), 8)
    whole = fit_tied(*given)
    monkeypatch.setattr(tied, "BLOCK_ROWS", 64)
    with LargestDouble() as seen:
        pieces = fit_tied(*given)
    assert seen.elements <= max(1000, 64 * 12)
    torch.testing.assert_close(pieces.matrix, whole.matrix)
    torch.testing.assert_close(pieces.weight, whole.weight)


def test_the_basis_is_one_on_every_machine() -> None:
    covariance = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(principal_basis(covariance), expected)


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_neox", "layer_norm in gpt_neox.layers.0.input_layernorm subtracts the mean over the channels"),
        ("gemma2", "add in model.layers.0 adds what a norm yields to the residual stream"),
    ],
)
def test_norms_that_do_not_commute(foundry: Foundry, family: str, reason: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(foundry.teacher(family), NARROW, importance=principal(foundry))
    (error,) = caught.value.errors
    assert error.path == "importance.hidden_basis" and reason in error.message
    assert error.message.startswith(f"the residual stream of this {family} cannot be rotated")
    assert error.hint == "write channels, or leave it out"


def test_other_widths_of_such_a_model_are_narrowed_all_the_same(foundry: Foundry) -> None:
    plan = foundry.plan(foundry.teacher("gpt_neox"), {"intermediate_size": 24}, importance=principal(foundry))
    assert not plan.rotates
    assert any("hidden_size is not narrowed" in remark for remark in plan.remarks)


def test_nothing_to_untie(foundry: Foundry) -> None:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(foundry.teacher("phi3"), NARROW, importance=principal(foundry, untie=True))
    (error,) = caught.value.errors
    assert error.path == "importance.untie"
    assert error.message == "the head of this phi3 has a matrix of its own already: tie_word_embeddings is false"
