"""Products in float8 in a plan: the layers that the runtime chooses, their memory, their time, and devices that have
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.compiler.estimate.activations import Footprint
from minitron.compiler.estimate.devices import Cluster, Device
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.fit import fits_json
from minitron.compiler.estimate.float8 import NO_LINEARS, ROUNDING, Linears, linears_of
from minitron.compiler.estimate.hardware import HardwareAssumptions, in_peak_units, read_hardware
from minitron.compiler.estimate.memory import Layout, LossWork, Running, Shape, training_memory
from minitron.compiler.plan.plan import Plan
from minitron.compiler.plan.remarks import float8_remarks
from minitron.compiler.plan_document import plan_document
from minitron.runtime.float8 import Float8Weight, float8_linears, hold_teacher_in_float8
from minitron.runtime.models import LanguageModel
from minitron.specs.float8 import fits_float8
from minitron.specs.training_plan import HeadPlan
from tests.foundry import Foundry
from tests.models import tiny_config

LINEARS = Linears(weights=640, rows=48, largest=(16, 32), all=True)
STUDENT = Shape(parameters=1000, layer=300, outside=400, hidden=10, vocabulary=20, float8=LINEARS)
TEACHER = Shape(parameters=3000, layer=900, outside=1200, hidden=30, vocabulary=20, float8=LINEARS)
ONE = Layout(1, micro_batch=2, steps=2, student_sharded=True, teacher_sharded=True, recompute=False)
LOSS = LossWork(length=4, chunk_tokens=4, cross_entropy=False, softcap=False)
HEAD = HeadPlan(backbone="model", module="lm_head", weight="lm_head.weight", bias=None, scale=1.0, softcap=None)


@pytest.mark.parametrize("changes", [{"hidden_size": 32, "intermediate_size": 48}, {"intermediate_size": 40}])
def test_a_plan_counts_the_layers_that_the_runtime_chooses(changes: dict[str, int]) -> None:
    pytest.importorskip("torchao")
    config = tiny_config("llama", **changes)
    model = AutoModelForCausalLM.from_config(config)
    planned = linears_of(model, "model.layers", config.to_dict())
    chosen = float8_linears(LanguageModel(model, HEAD, "model.layers"), "teacher.compute")
    assert planned.weights == sum(one.weight.numel() for one in chosen.values()) > 0
    assert planned.rows == sum(one.out_features for one in chosen.values())
    assert planned.all == ("intermediate_size" in changes and changes["intermediate_size"] % 16 == 0)
    whole = sum(parameter.numel() for parameter in model.parameters())
    cpu = torch.device("cpu")
    hold_teacher_in_float8(LanguageModel(model, HEAD, "model.layers"), cpu, cpu)
    assert any(isinstance(module, Float8Weight) for module in model.modules())
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert planned.held(whole, 4) == held, "to the byte"


def test_which_layers() -> None:
    assert fits_float8("self_attn.q_proj", 48, 32, frozenset({8}))
    assert not fits_float8("mlp.down_proj", 32, 40, frozenset())
    assert not fits_float8("mlp.gate", 16, 32, frozenset({16})), "a router"
    assert not fits_float8("mlp.experts.3.up_proj", 48, 32, frozenset()), "an expert"
    assert linears_of(torch.nn.ModuleDict({"layers": torch.nn.ModuleList()}), "layers", {}) == NO_LINEARS


class TestMemory:
    def parts(self, kind: str = "cuda", teacher: Shape = TEACHER, **changes: Any) -> dict[str, int]:
        running = Running(STUDENT, Footprint(50, 5)), Running(teacher, Footprint(0, 7))
        found = training_memory(kind, replace(ONE, **changes), *running, 2, LOSS)
        return {**found.parts, "peak": found.peak}

    def test_a_byte_a_weight_and_four_a_row(self) -> None:
        assert self.parts()["teacher"] == 6000
        assert self.parts(float8_teacher=True)["teacher"] == 2 * (3000 - 640) + 640 + 4 * 48
        assert self.parts("cpu", float8_teacher=True)["teacher"] == 4 * (3000 - 640) + 640 + 4 * 48
        assert self.parts(float8_student=True)["weights"] == self.parts()["weights"], "the student's stay what they are"

    def test_spread_it_is_divided_and_gathered_as_it_is_held(self) -> None:
        whole, eighth = self.parts(float8_teacher=True), self.parts(float8_teacher=True, devices=8)
        assert eighth["teacher"] == whole["teacher"] / 8
        in_layers = (whole["teacher"] - 2 * 1200) / 1800
        gathered = eighth["gathered"] - self.parts(devices=8)["gathered"]
        assert gathered == round(2 * 900 * (in_layers - 2))

    def test_rounding_takes_memory_for_a_moment(self) -> None:
        """16 x 32 weights and 8 tokens: the weight in float8 and, without a kernel that does it at once, in fp32."""
        beside = LINEARS.beside(8, "cuda", training=False, compiled=False)
        assert beside == 8 * 32 + 16 * 32 + ROUNDING * 16 * 32
        assert LINEARS.beside(8, "cuda", training=False, compiled=True) == 8 * 32 + 16 * 32
        assert LINEARS.beside(64, "cuda", training=True, compiled=True) == 64 * 32 + 64 * 16, "the weight's gradient"
        assert LINEARS.beside(8, "cpu", training=False, compiled=True) == 9 * (8 * 32 + 16 * 32)
        assert self.parts(float8_teacher=True)["transient"] == 7 + beside


Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(foundry: Foundry) -> Planned:
    teacher = foundry.teacher("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    data = {"text": [str(foundry.root / "corpus.txt")]}
    base = foundry.plan(teacher, {"intermediate_size": 64})

    def plan(of_teacher: str = "bfloat16", **distill: Any) -> Plan:
        block = {"data": data, "tokens": 64_000, "sequence_length": 128, "global_batch_size": 16, **distill}
        loaded = foundry.load(teacher, {"intermediate_size": 64}, distill=block)
        as_asked = loaded.spec.teacher.model_copy(update={"compute": of_teacher})
        spec = loaded.spec.model_copy(update={"teacher": as_asked})
        return replace(base, loaded=replace(loaded, spec=spec))

    return plan


class TestPlan:
    def test_products_in_float8_take_half_the_time(self, planned: Planned) -> None:
        hardware, before = read_hardware("h100", 0.5, None), Estimate(planned())
        after = Estimate(planned("float8", compute="float8"))
        assert before.float8_flops() == 0 and after.token_flops() == before.token_flops()
        linears = 6 * after.student.float8.weights + 2 * after.teacher.float8.weights
        assert after.float8_flops() == linears > 0.5 * after.token_flops()
        plain, fast = (one.phases(hardware)[-1] for one in (before, after))
        saved = hardware.hours(plain.flops, plain.float8) - hardware.hours(fast.flops, fast.float8)
        assert saved == pytest.approx(hardware.hours(fast.float8) / 2)
        assert fast.to_json(hardware)["float8_flops"] == fast.float8 == fast.tokens * linears
        again = Estimate(planned("float8", compute="float8", gradient_checkpointing=True))
        assert again.float8_flops() == linears + 2 * after.student.float8.weights

    def test_a_device_without_it_takes_as_long(self) -> None:
        a100, h100 = (read_hardware(name, None, None).cluster for name in ("a100", "h100"))
        assert in_peak_units(10.0, 8.0, a100) == 10.0 and in_peak_units(10.0, 8.0, h100) == 6.0

    def test_a_device_without_it_does_not_fit(self, planned: Planned) -> None:
        plan = planned("float8", compute="float8")
        for name, ok in (("h100", True), ("h200", True), ("b200", True), ("a100", False), ("a100-40", False)):
            found = fits_json(Estimate(plan), read_hardware(name, None, None))
            assert found["ok"] == ok, name
        assert found["reason"] == "a100-40 has no products in float8: that needs compute capability 8.9 or later"
        assert found["nearest"].startswith("distill.compute: bfloat16 and teacher.compute: bfloat16 (")
        only = fits_json(Estimate(planned(compute="float8")), read_hardware("a100", None, None))
        assert only["nearest"].startswith("distill.compute: bfloat16 (")

    def test_a_teacher_in_float8_is_the_change_where_that_is_enough(self, planned: Planned) -> None:
        plan = planned(micro_batch_size=1, gradient_checkpointing=True)
        estimate = Estimate(plan)
        need = estimate.training("cuda", replace(estimate.layout(1), float8_teacher=True)).peak
        found = [
            fits_json(Estimate(plan), HardwareAssumptions(Cluster(Device("card", need, 1e12, float8=fast)), named=True))
            for fast in (2.0, 0.0)
        ]
        assert found[0]["nearest"].startswith("teacher.compute: float8 (")
        assert "float8" not in (found[1]["nearest"] or "")

    def test_the_document_and_the_remark(self, planned: Planned) -> None:
        document = plan_document(planned("float8", compute="float8"))
        names = [cost["name"] for cost in document["costs"]]
        assert "distill: of it in float8" in names
        plain = plan_document(planned())
        assert "distill: of it in float8" not in [cost["name"] for cost in plain["costs"]]
        (remark,) = float8_remarks(planned("float8").loaded.spec)
        assert "float8 without `distill.compile: true`" in remark
        assert not float8_remarks(planned("float8", compile=True).loaded.spec)
        assert not float8_remarks(planned().loaded.spec)

    def test_a_teacher_of_stored_samples_is_in_float8_while_they_are_drawn(self, planned: Planned) -> None:
        estimate = Estimate(planned("float8", teacher_logits={"sampled": 3}))
        capture, distill = estimate.phases(read_hardware("h100", None, None))[-2:]
        weights = estimate.teacher.float8.weights
        assert (capture.float8, distill.float8) == (2 * capture.tokens * weights, 0)
        assert capture.memory.parts["teacher"] == estimate.teacher.float8.held(estimate.teacher.parameters, 4)
