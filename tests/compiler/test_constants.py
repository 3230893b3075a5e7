"""Constants that follow a width: Gemma multiplies its embedding by sqrt(hidden_size), anew on every load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron.compiler import Plan, compile
from minitron.compiler.capture.capture import capture
from minitron.compiler.rewrite import scale_repair as constants
from minitron.compiler.weights.buffers import load_buffers
from minitron.compiler.weights.recipes import Recipe
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from tests.foundry import Build, Folder, Foundry
from tests.models import tiny_config

RATIO = math.sqrt(32) / math.sqrt(24)
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-8}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def build(request: pytest.FixtureRequest, foundry: Foundry) -> Build:
    return foundry.build(
        foundry.teacher("gemma2", request.param, num_hidden_layers=2), {"hidden_size": 24}, dtype=request.param
    )


def test_the_factor_goes_into_embedding_and_final_norm(build: Build) -> None:
    """The head shares the embedding, so the norm in front of it, 1 + w, is divided by what the embedding gains."""
    kept = build.document("plan.json")["selection"]["hidden_size"][0]
    teacher = load_file(build.teacher / "model.safetensors")
    tolerance = ROUNDING[build.config["dtype"]]
    embedding, norm = build.tensors["model.embed_tokens.weight"], build.tensors["model.norm.weight"]
    wanted = teacher["model.embed_tokens.weight"][:, kept].double() * RATIO
    torch.testing.assert_close(embedding.double(), wanted, rtol=tolerance, atol=1e-7)
    wanted = (1 + teacher["model.norm.weight"][kept].double()) / RATIO
    torch.testing.assert_close(1 + norm.double(), wanted, rtol=tolerance, atol=tolerance)
    assert "lm_head.weight" not in build.tensors
    other = "model.layers.0.input_layernorm.weight"
    assert torch.equal(build.tensors[other], teacher[other][kept]), "norms inside the layers are as they were"


def test_with_it_the_student_is_the_masked_teacher(build: Build) -> None:
    assert build.checks["masked"]["passed"] and build.checks["masked"]["exact"]
    assert build.checks["masked"]["max_error"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_it_the_student_is_off_by_per_cents(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(compile, "changed_buffers", lambda *args: {})
    loaded = foundry.load(foundry.teacher("gemma2", dtype, num_hidden_layers=2), {"hidden_size": 24}, dtype=dtype)
    with pytest.raises(WorkError, match="the student failed its check `masked`"):
        foundry.compile(loaded, tmp_path)
    checks = Folder(tmp_path).checks
    assert [name for name, check in checks.items() if not check["passed"]] == ["masked"]
    assert checks["masked"]["max_error"] > 0.03


def test_a_head_of_its_own_needs_no_second_repair(foundry: Foundry) -> None:
    build = foundry.build(
        foundry.teacher("gemma2", num_hidden_layers=2, tie_word_embeddings=False), {"hidden_size": 24}
    )
    kept = build.document("plan.json")["selection"]["hidden_size"][0]
    teacher = load_file(build.teacher / "model.safetensors")
    torch.testing.assert_close(
        build.tensors["model.embed_tokens.weight"], teacher["model.embed_tokens.weight"][:, kept] * RATIO
    )
    for untouched in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(build.tensors[untouched], teacher[untouched][..., kept])


def test_nothing_is_repaired_where_nothing_changed(foundry: Foundry) -> None:
    build = foundry.build(foundry.teacher("gemma2", num_hidden_layers=2), {"intermediate_size": 24})
    teacher = load_file(build.teacher / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(build.tensors[name], teacher[name])


def test_tables_that_differ_are_found_by_the_students_names(foundry: Foundry) -> None:
    plan = foundry.whole("gemma2")
    same = load_buffers(plan.teacher.captured.model)
    assert constants.changed_buffers(plan.teacher.captured, same, same, dict(enumerate(range(3)))) == {}
    changed = {name: value * 1.001 for name, value in same.items()}
    assert constants.changed_buffers(plan.teacher.captured, same, changed, dict(enumerate(range(3)))) == {
        one: one for one in same
    }
    (name,) = [name for name in same if "embed_scale" in name]
    gone = {key: value for key, value in same.items() if key != name}
    assert constants.changed_buffers(plan.teacher.captured, same, gone, dict(enumerate(range(3)))) == {name: name}


def test_a_table_that_cannot_be_repaired_refuses_the_spec(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary frequencies that would follow a width, say: no weight could make up for it."""
    changed = "model.rotary_emb.inv_freq"
    monkeypatch.setattr(compile, "changed_buffers", lambda *args: {changed: changed})
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), {"intermediate_size": 24})
    with pytest.raises(SpecInvalid, match=f"student: {changed} is computed from a narrowed width.*no repair is known"):
        foundry.compile(loaded, tmp_path)
    assert not (tmp_path / "student").exists()


def recipes_of(plan: Plan) -> dict[str, Recipe]:
    return {name: Recipe(name, ()) for name in plan.teacher.table.parameters}


def test_a_factor_that_is_not_one_on_an_embedding_is_refused(foundry: Foundry) -> None:
    plan = foundry.whole("llama")
    with pytest.raises(
        UsageError, match=r"rotary_emb.inv_freq depends on a narrowed width .* no repair is known for it"
    ):
        constants.repair_scale(plan.teacher.captured.graph_module, "model.rotary_emb.inv_freq", 1.1, recipes_of(plan))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"query_pre_attn_scalar": 13},
            r"in model.layers.0.self_attn .*\(0.288675 in the teacher, 0.27735 in the student",
        ),
        (
            {"rms_norm_eps": 1e-4},
            r"add in model.layers.0.input_layernorm .*\(1e-06 in the teacher, 0.0001 in the student",
        ),
        ({"final_logit_softcapping": 6.0}, r"\(5 in the teacher, 6 in the student"),
    ],
)
def test_numbers_inside_operators_are_compared(change: dict[str, Any], words: str) -> None:
    mine = capture(tiny_config("gemma2", num_hidden_layers=2))
    theirs = capture(tiny_config("gemma2", num_hidden_layers=2, **change))
    numbers = {0: 0, 1: 1}
    constants.check_scalars(mine, mine, numbers)
    with pytest.raises(UsageError, match=words):
        constants.check_scalars(mine, theirs, numbers)


def test_numbers_are_compared_with_those_of_the_layer_that_was_kept() -> None:
    """A teacher layer's numbers are looked for where the student has that layer."""
    mine = capture(tiny_config("llama", num_hidden_layers=3))
    theirs = capture(tiny_config("llama", num_hidden_layers=2))
    constants.check_scalars(mine, theirs, {0: 0, 2: 1})
    for node in mine.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor and "layers.1." in mine.module_of(node):
            node.update_arg(1, 0.5) if isinstance(node.args[1], float) else None
    constants.check_scalars(mine, theirs, {0: 0, 2: 1})
    with pytest.raises(UsageError, match=r"layers\.1\.input_layernorm"):
        constants.check_scalars(mine, theirs, {0: 0, 1: 1})
