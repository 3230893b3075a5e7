"""Rotary frequencies in two sets, for short sequences and for long ones (longrope): captured, narrowed and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.specs.errors import SpecInvalid
from tests.foundry import Build, Foundry, executor, load_model, logits, teacher_model, token_ids

SHORT, LONG = 20, 60  # tokens of a sequence on either side of what the model was first trained on
ORIGINAL = 32


def longrope(factors: int, partial: float = 1.0) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": partial,
            "short_factor": [1.0 + 0.1 * i for i in range(factors)], "long_factor": [1.0 + 1.5 * i for i in range(factors)],
            "original_max_position_embeddings": ORIGINAL,
        },
        "original_max_position_embeddings": ORIGINAL,
    }  # fmt: skip


FAMILIES = {
    "phi3": ("phi3", longrope(4)),
    "a part of the head rotates": ("phi3", longrope(3, 0.75)),
    "llama": ("llama", longrope(4)),
}


def teacher(foundry: Foundry, name: str) -> Path:
    family, keys = FAMILIES[name]
    return foundry.teacher(family, **keys, num_hidden_layers=2)


@pytest.fixture(scope="module", params=FAMILIES)
def build(request: pytest.FixtureRequest, foundry: Foundry) -> Build:
    student = {"intermediate_size": 24, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
    if FAMILIES[request.param][0] == "phi3":
        student = {"intermediate_size": 24, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    else:
        student = {"intermediate_size": 24, "hidden_size": 24}
    return foundry.build(teacher(foundry, request.param), student)


@pytest.mark.parametrize("length", [SHORT, ORIGINAL, ORIGINAL + 1, LONG])
def test_the_graph_is_the_model_on_either_side(build: Build, length: int) -> None:
    ids = token_ids(2, length)
    found: list[torch.Tensor] = []
    executor(build.plan).run([ids], output=lambda result, _: found.append(result))
    wanted = logits(teacher_model(build.plan), ids)
    assert (found[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_two_sets_differ(build: Build) -> None:
    """Else the tests above would tell nothing: the same tokens, behind one another, with either set."""
    model, ids = teacher_model(build.plan), token_ids(1, LONG)
    whole, part = logits(model, ids)[:, :SHORT], logits(model, ids[:, :SHORT])
    assert (whole - part).abs().max() > 1e-2


def test_the_student_passes_its_checks_and_its_program_runs_on_either_side(build: Build) -> None:
    assert all(check["passed"] for check in build.checks.values())
    program = torch.export.load(build.folder / "student.pt2").module()
    program.load_state_dict(build.tensors, strict=False, assign=True)
    model = load_model(build.folder / "student")
    for length in (SHORT, LONG):
        ids = token_ids(2, length)
        with torch.no_grad():
            got = program(ids)
        wanted = logits(model, ids)
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_head_width_that_the_configuration_derives(foundry: Foundry) -> None:
    with pytest.raises(SpecInvalid, match=r"short_factor.*must have length 3.*narrow both in that proportion"):
        foundry.plan(teacher(foundry, "phi3"), {"hidden_size": 24})
