"""The phases of a plan: what is done in which order, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron.compiler.emit.training_plan import training_plan
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.hardware import read_hardware
from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.plan.plan import Plan
from minitron.compiler.plan_document import plan_document
from minitron.specs.training_plan import to_document
from tests.foundry import Foundry

FFN = {"intermediate_size": 24}
TOKENS = 64_000

Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(foundry: Foundry) -> Planned:
    """The plan of one teacher and student with `distill` as it is given, and other blocks. The teacher is traced once: phases
    follow from the spec and the costs."""
    teacher = foundry.teacher("llama")
    data = {"text": [str(next(teacher.parent.rglob("*.txt")))]}
    base = foundry.plan(teacher, FFN)

    def plan(distill: dict[str, Any], **blocks: Any) -> Plan:
        block = {"data": data, "tokens": TOKENS, "sequence_length": 32, "global_batch_size": 4, **distill}
        return replace(base, loaded=foundry.load(teacher, FFN, distill=block, **blocks))

    return plan


def phases(plan: Plan) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in plan_document(plan)["phases"]}


def test_the_correction_of_the_teacher_stands_before_the_distillation(planned: Planned) -> None:
    plan = planned({}, teacher_correction={"tokens": 6400})
    found = phases(plan)
    assert list(found) == ["calibrate", "teacher_correction", "distill"]
    correction = found["teacher_correction"]
    assert correction["tokens"] == 6400
    # Forward and backward of the teacher, 3 forwards' worth; distillation has one of the teacher beside the student's.
    each = correction["flops"] // 6400
    assert each % 3 == 0 and found["distill"]["flops"] // TOKENS > each // 3
    # Weights, gradients and two moments in fp32, and no second model beside.
    assert correction["peak_memory_bytes"] >= 16 * Estimate(plan).teacher_costs.parameters


def test_every_phase_says_what_it_does(planned: Planned) -> None:
    plan = planned({"teacher_logits": {"sampled": 3}}, teacher_correction={"tokens": 6400})
    does = {name: phase["does"] for name, phase in phases(plan).items()}
    assert list(does) == ["calibrate", "teacher_correction", "capture", "distill"]
    assert "6 samples of 48 tokens" in does["calibrate"]
    assert "3 samples of the teacher's distribution" in does["capture"]
    assert does["distill"] == (
        "trains the student from stored samples of the teacher: 500 steps of 4 sequences of 32 tokens"
    )
    assert does["teacher_correction"].endswith(": 50 steps of 4 sequences of 32 tokens")


def test_hours_on_every_kind_of_device(planned: Planned) -> None:
    hardware = read_hardware("h200x8", 0.5, None)
    document = plan_document(planned({"tokens": "100000B"}), hardware=hardware)
    found = {one["device"]: one for one in document["devices"]}
    assert list(found) == ["a100-40x8", "a100-80x8", "h100x8", "h200x8", "b200x8"]
    whole = sum(phase["device_hours"] for phase in document["phases"])
    assert found["h200x8"]["device_hours"] == pytest.approx(whole, rel=1e-3)
    assert found["a100-80x8"]["device_hours"] == pytest.approx(whole * 989 / 312, rel=1e-3)
    assert found["h200x8"]["days"] == pytest.approx(whole / 8 / 24, rel=1e-3)
    this = plan_document(planned({}), hardware=read_hardware("cpu", None, None))["devices"][-1]
    assert this["device"] == "this" and this["memory_bytes"] > 0, "this machine, where it was named"


def resolved(plan: Plan, folder: Path, teacher_costs: ModelCosts | None = None) -> dict[str, Any]:
    costs = {"teacher": teacher_costs or Estimate(plan).teacher_costs, "student": Estimate(plan).student_costs}
    return to_document(training_plan(plan.loaded, folder, plan.checkpoint, plan.heads, "layers", "0", costs))


PHASES: dict[str, Any] = {
    "tokens": TOKENS,
    "phases": [
        {"tokens": TOKENS // 2},
        {"tokens": TOKENS // 2, "sequence_length": 64, "global_batch_size": 2, "data": {"text": ["other.txt"]}},
    ],
}


def test_each_phase_of_a_training_has_its_price(planned: Planned, tmp_path: Path) -> None:
    alone, several = planned({}), planned(PHASES)
    found = phases(several)
    assert list(found) == ["calibrate", "distill_1", "distill_2"]
    first, second = found["distill_1"], found["distill_2"]
    assert first["does"].endswith(": 250 steps of 4 sequences of 32 tokens")
    assert second["does"].endswith(": 250 steps of 2 sequences of 64 tokens")
    assert 2 * first["flops"] == phases(alone)["distill"]["flops"]
    assert second["flops"] > first["flops"], "attention over sequences of twice the length"
    assert second["peak_memory_bytes"] != first["peak_memory_bytes"]
    assert (first["disk_bytes"], second["disk_bytes"]) == (0, phases(alone)["distill"]["disk_bytes"])


def test_training_yaml_has_the_phases_with_every_value(planned: Planned, tmp_path: Path) -> None:
    plan = planned(PHASES)
    (plan.loaded.folder / "other.txt").write_text("x")
    document = resolved(plan, tmp_path)
    first, second = document["phases"]
    estimate = {name: one.token_flops() for name, one in Estimate(plan).stretches()}
    assert first == {
        "tokens": TOKENS // 2, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 4, "data": None,
        "flops_per_token": estimate["distill_1"],
    }  # fmt: skip
    assert (second["sequence_length"], second["global_batch_size"], second["micro_batch_size"]) == (64, 2, 2)
    assert second["data"]["text"] == [str(plan.loaded.folder / "other.txt")]
    assert second["flops_per_token"] == estimate["distill_2"]
    assert resolved(planned({}), tmp_path)["phases"] == []


def test_the_phase_that_does_not_fit_is_named(planned: Planned) -> None:
    """The longer sequences of the second phase need more than the device has, and what would do is written there."""
    longer = PHASES["phases"][1] | {"global_batch_size": 8}
    plan = planned(PHASES | {"phases": [PHASES["phases"][0], longer]})
    estimate = Estimate(plan)
    peaks = [one.training("cuda", one.layout(1)).peak for _, one in estimate.stretches()]
    assert peaks[1] > peaks[0]
    hardware = read_hardware("h100", None, None)
    small = replace(hardware.cluster.device, memory_bytes=(peaks[0] + peaks[1]) // 2)
    tight = replace(hardware, cluster=replace(hardware.cluster, device=small))
    found = plan_document(plan, hardware=tight)["fits"]
    assert found["ok"] is False and found["reason"].startswith("distill_2 needs")
    assert found["nearest"].startswith("distill.phases.1.micro_batch_size: ")
