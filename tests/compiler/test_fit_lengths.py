"""Lengths that a spec leaves open are what the teacher reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron.compiler import make_plan, plan_document
from minitron.specs.blocks.base import LONGEST_SEQUENCE
from minitron.specs.schema import json_schema
from tests.foundry import Foundry

STUDENT = {"layers": {"drop": [1]}}


def planned(foundry: Foundry, folder: Path, positions: int, **more: Any) -> Any:
    teacher = foundry.teacher("llama", num_hidden_layers=2, max_position_embeddings=positions)
    data = {"text": [str(foundry.root / "corpus.txt")]}
    loaded = foundry.load(teacher, STUDENT, importance={"data": data}, distill={"data": data, "tokens": 10**8} | more)
    return make_plan(loaded, build=folder)


def test_what_is_left_out_is_what_the_teacher_reads(foundry: Foundry, tmp_path: Path) -> None:
    for positions, length in ((128, 128), (100_000, LONGEST_SEQUENCE)):
        plan = planned(foundry, tmp_path, positions)
        spec = plan.loaded.spec
        assert spec.distill.sequence_length == spec.importance.data.sequence_length == length
        assert spec.distill.global_batch_size == min(768, 10**8 // (300 * length)), "at least 300 steps"
        fitted = plan_document(plan)["spec"]["fitted"]
        shorter = {"distill.sequence_length", "importance.data.sequence_length"} & fitted.keys()
        assert len(shorter) == (2 if length < LONGEST_SEQUENCE else 0) and all(fitted[one] == length for one in shorter)
        # The spec as it is written stays the same, whatever its teacher reads, and the schema says its default.
        assert plan.loaded.resolved["distill"]["sequence_length"] == LONGEST_SEQUENCE
        (default,) = {
            block["properties"]["sequence_length"]["default"]
            for name, block in json_schema()["$defs"].items()
            if name in ("Distill", "CalibrationData")
        }
        assert default == LONGEST_SEQUENCE


def test_what_is_written_is_taken(foundry: Foundry, tmp_path: Path) -> None:
    plan = planned(foundry, tmp_path, 128, sequence_length=64, global_batch_size=4)
    assert plan.loaded.spec.distill.sequence_length == 64 and plan.loaded.spec.distill.global_batch_size == 4
    assert "distill.sequence_length" not in plan.loaded.fitted
    assert planned(foundry, tmp_path, 128, global_batch_size=4).loaded.spec.distill.global_batch_size == 4
