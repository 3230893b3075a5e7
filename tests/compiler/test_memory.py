"""What a device holds: the parts follow from shapes, and the fits and changes from the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron.compiler.estimate import choice
from minitron.compiler.estimate.activations import Footprint, Living, Work, footprint
from minitron.compiler.estimate.choice import WAYS
from minitron.compiler.estimate.devices import Cluster, Device
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.fit import fits_json
from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.memory import (
    Layout,
    LossWork,
    Running,
    Shape,
    calibration_memory,
    logits_bytes,
    training_memory,
)
from minitron.compiler.estimate.training_defaults import micro_batch
from minitron.compiler.importance import calibrate
from minitron.compiler.importance.progress_file import Interrupted
from minitron.compiler.importance.room import Room
from minitron.compiler.plan.plan import Plan
from minitron.compiler.plan_document import plan_document
from minitron.specs.progress import Silent
from tests.foundry import Foundry, executor, token_ids
from tests.models import tiny_config

STUDENT = Shape(parameters=1000, layer=300, outside=400, hidden=10, vocabulary=20)
TEACHER = Shape(parameters=3000, layer=900, outside=1200, hidden=30, vocabulary=20)
REFIT = {"refit": "least_squares"}
ONE = Layout(1, micro_batch=1, steps=2, student_sharded=True, teacher_sharded=True, recompute=False)
LOSS = LossWork(length=4, chunk_tokens=4, cross_entropy=False, softcap=False)


def held(kind: str, layout: Layout, teacher: Shape | None = TEACHER) -> dict[str, int]:
    beside = None if teacher is None else Running(teacher, Footprint(0, 7))
    found = training_memory(kind, layout, Running(STUDENT, Footprint(50, 5)), beside, 2, LOSS)
    assert found.peak <= sum(found.parts.values()) + 7
    return {**found.parts, "peak": found.peak}


class TestParts:
    def test_one_device_holds_everything(self) -> None:
        parts = held("cuda", ONE)
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4000, 4000, 8000)
        assert parts["teacher"] == 6000 and parts["gathered"] == 0
        assert held("cpu", ONE)["teacher"] == 12000  # fp32 there, whatever the checkpoint is in

    def test_narrow_weights_and_moments(self) -> None:
        narrow = replace(ONE, bf16_weights=True, moments="int8")
        parts = held("cuda", narrow)
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2000, 2000, 2032)
        assert held("cuda", replace(ONE, moments="bfloat16"))["optimizer"] == 4000
        assert held("cpu", narrow)["weights"] == 4000  # a CPU holds the same numbers in fp32

    def test_muons_matrices_have_one_moment(self) -> None:
        with_matrices, work = Running(replace(STUDENT, matrices=500), Footprint(50, 5)), LOSS
        for states, both in (("float32", 8), ("bfloat16", 4)):
            layout = replace(ONE, muon=True, moments=states)
            found = training_memory("cuda", layout, with_matrices, None, 2, work)
            assert found.parts["optimizer"] == 500 * both + 500 * both / 2

    def test_sharded_models_are_divided_and_gathered_by_layers(self) -> None:
        parts = held("cuda", replace(ONE, devices=8))
        assert (parts["weights"], parts["optimizer"], parts["teacher"]) == (500, 1000, 750)
        student = (400 + 2 * 300) * 2 + 300 * (
            2 + 4
        )  # bf16 units; a layer's gradient in bf16 and, to be summed, in fp32
        assert parts["gathered"] == student + (1200 + 2 * 900) * 2

    def test_replicated_ones_are_not(self) -> None:
        parts = held("cuda", replace(ONE, devices=8, student_sharded=False, teacher_sharded=False))
        assert (parts["weights"], parts["teacher"], parts["gathered"]) == (4000, 6000, 0)

    def test_without_a_teacher_there_is_none(self) -> None:
        assert held("cuda", ONE, teacher=None)["teacher"] == 0
        assert logits_bytes("cuda", 1, LOSS, STUDENT, None) < logits_bytes("cuda", 1, LOSS, STUDENT, TEACHER)

    def test_states_that_are_compared_wait_for_the_loss(self) -> None:
        """The teacher's in the dtype that they are computed in, and a gradient in fp32 for each of the student's."""
        compared = replace(LOSS, compared=3)
        for kind, element in (("cuda", 2), ("cpu", 4)):
            more = logits_bytes(kind, 2, compared, STUDENT, TEACHER) - logits_bytes(kind, 2, LOSS, STUDENT, TEACHER)
            assert more == 3 * (2 * 4) * (30 * element + 10 * 4)

    def test_gradients_of_earlier_micro_batches_wait(self) -> None:
        assert held("cuda", ONE)["peak"] > held("cuda", replace(ONE, steps=1))["peak"]

    def test_weights_in_host_memory_are_not_on_the_device(self) -> None:
        assert held("cuda", replace(ONE, offload=True))["weights"] == 0


class TestFootprint:
    @pytest.mark.parametrize("recompute", [False, True])
    def test_a_few_layers_stand_for_all(self, recompute: bool) -> None:
        """Whole, with data: the same bytes."""
        config = tiny_config("llama", num_hidden_layers=5, hidden_size=64, intermediate_size=128, head_dim=16)
        work = Work(2, 32, torch.float32, training=True, recompute=recompute)
        estimated = footprint(config, "sdpa", "model", "model.layers", 5, work)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        living = Living([*model.parameters(), *model.buffers()])
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with living:
            hidden = model.model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False).last_hidden_state
            kept = living.now
            hidden.backward(torch.ones_like(hidden))
        assert estimated.kept == pytest.approx(kept, rel=0.05)
        assert estimated.kept + estimated.transient == pytest.approx(living.peak, rel=0.05)

    def test_recomputation_keeps_less_and_a_forward_alone_nothing(self) -> None:
        config = tiny_config("llama", num_hidden_layers=4)

        def run(**how: Any) -> Footprint:
            return footprint(config, "sdpa", "model", "model.layers", 4, Work(1, 32, torch.float32, **how))

        assert run(training=True, recompute=True).kept < run(training=True).kept / 2
        assert run().kept == 0 < run().transient


@pytest.mark.parametrize(
    ("metric", "changes"),
    [
        ("block_influence", {"vocab_size": 16384}),  # the embedding is the largest thing, alone in memory
        ("block_influence", {"vocab_size": 8192, "tie_word_embeddings": True}),  # it stays: it is the head
        ("block_influence", {"hidden_size": 128, "intermediate_size": 1024, "head_dim": 32}),  # a layer is
        ("logit_mse", {"vocab_size": 2048}),
        ("loss", {"vocab_size": 2048}),
        (
            "principal",
            {"hidden_size": 384, "head_dim": 96},
        ),  # the covariance in fp64, three times with that of a tied head
        ("principal", {"hidden_size": 384, "head_dim": 96, "tie_word_embeddings": True}),
        ("greedy", {"intermediate_size": 768}),  # the Gram matrix of one layer's neurons, its inverse and products
    ],
)
def test_scoring_holds_what_the_plan_says(foundry: Foundry, metric: str, changes: dict[str, Any]) -> None:
    samples, length = (2, 16) if metric == "principal" else (4, 128)
    data = foundry.calibration | {"samples": samples, "sequence_length": length}
    importance: dict[str, Any] = {"data": data}
    importance |= {
        "principal": {"hidden_basis": "principal"}, "greedy": {"selection": "greedy"}
    }.get(metric, {"depth": {"metric": metric}})  # fmt: skip
    teacher = foundry.teacher("llama", **changes)
    student = {"num_hidden_layers": 2, "intermediate_size": 24} | ({"hidden_size": 24} if metric == "principal" else {})
    plan = foundry.plan(teacher, student, importance=importance, recovery=REFIT if metric == "greedy" else {})
    sizes = Estimate(plan).calibration_sizes(samples, length, torch.float32)
    room = Room(
        batch=1 if metric == "principal" else samples
    )  # several: the first product is what the next is added to
    planned = calibration_memory(sizes, room, "cpu", compared=metric in ("loss", "logit_mse"))
    living, run, ids = Living(), executor(plan, fast=True), token_ids(samples, length)
    with living:
        calibrate.calibrate(
            plan.teacher, run, ids, plan.taken,
            calibrate.Run(True, Interrupted(plan.build / "partial.safetensors", "k"), Silent(), room),
        )  # fmt: skip
    assert planned.peak == pytest.approx(living.peak, rel=0.1)
    if metric in ("principal", "greedy"):
        scores = sizes.scores
        accumulated = scores.kept + scores.covering + scores.grams + max(scores.adding, scores.settling)
        assert accumulated > planned.peak / 2, "they decide it here"


Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(foundry: Foundry) -> Planned:
    teacher = foundry.teacher("llama")
    data = {"text": [str(foundry.root / "corpus.txt")]}
    base = foundry.plan(teacher, {"intermediate_size": 24})

    def plan(**distill: Any) -> Plan:
        block = {"data": data, "tokens": 64_000, "sequence_length": 128, "global_batch_size": 16, **distill}
        return replace(base, loaded=foundry.load(teacher, {"intermediate_size": 24}, distill=block))

    return plan


def on(device: Device, count: int = 1) -> HardwareAssumptions:
    return HardwareAssumptions(Cluster(device, count), named=True)


def fits(plan: Plan, memory_bytes: int, count: int = 1) -> dict[str, Any]:
    return fits_json(Estimate(plan), on(Device("card", memory_bytes, 1e12), count))


class TestFits:
    def peak(self, plan: Plan, **changes: Any) -> int:
        estimate = Estimate(plan)
        return estimate.training("cuda", replace(estimate.layout(1), **changes)).peak

    def test_what_is_enough_fits_and_a_byte_less_does_not(self, planned: Planned) -> None:
        plan = planned(micro_batch_size=4)
        enough = max(self.peak(plan), *(phase["peak_memory_bytes"] for phase in plan_document(plan)["phases"]))
        assert fits(plan, enough) == {"device": "card", "ok": True, "nearest": None, "reason": None}
        found = fits(plan, self.peak(plan) - 1)
        assert not found["ok"] and found["reason"].startswith("distill needs") and "card has" in found["reason"]

    def test_the_nearest_change_is_the_first_that_fits(self, planned: Planned) -> None:
        plan = planned(micro_batch_size=4)
        two = self.peak(plan, micro_batch=2, steps=8)
        assert fits(plan, two)["nearest"].startswith("distill.micro_batch_size: 2 (")
        alone = planned(micro_batch_size=1)
        recomputed = self.peak(alone, recompute=True)
        assert recomputed < self.peak(alone)
        assert fits(alone, recomputed)["nearest"].startswith("distill.gradient_checkpointing: true (")

    def test_what_is_proposed_fits(self, planned: Planned) -> None:
        change = fits(planned(micro_batch_size=4), self.peak(planned(micro_batch_size=4), micro_batch=1, steps=16))
        assert change["nearest"].startswith("distill.micro_batch_size: 1")
        proposed = planned(micro_batch_size=1)
        assert fits(proposed, self.peak(proposed))["ok"]

    def test_devices_that_cannot_share_a_batch(self, planned: Planned) -> None:
        assert fits(planned(micro_batch_size=4), 10**12, count=8)["ok"], "each takes two at a time"
        found = fits(planned(micro_batch_size=4), 10**12, count=5)
        assert found["reason"] == "16 sequences of a global batch cannot be shared equally by 5 devices"
        assert found["nearest"].startswith("--device cardx4 (")

    def test_fewer_devices_where_no_more_of_them_could_share_a_batch(self, planned: Planned) -> None:
        found = fits(planned(micro_batch_size=4), 10**12, count=3)
        assert found["nearest"].startswith("--device cardx2 (")
        assert fits(planned(micro_batch_size=4), 10**12, count=2)["ok"]
        few = fits(planned(micro_batch_size=1, global_batch_size=4), 10**12, count=8)
        assert few["nearest"].startswith("--device cardx4 (")

    def test_where_nothing_helps(self, planned: Planned) -> None:
        assert fits(planned(micro_batch_size=1), 1000)["nearest"] in (
            None, "a device with more memory for `calibrate`, or --device cpu for that command",
        )  # fmt: skip

    def test_a_plan_says_so_only_where_a_device_is_named(self, planned: Planned) -> None:
        plan = planned()
        assert "fits" not in plan_document(plan)
        assert plan_document(plan, hardware=HardwareAssumptions(named=True))["fits"] == {
            "device": "h100", "ok": True, "nearest": None, "reason": None,
        }  # fmt: skip
        assert {cost["basis"] for cost in plan_document(plan)["costs"]} == {"exact", "estimated"}


def test_recomputing_costs_another_forward_of_the_layers(planned: Planned) -> None:
    plain, again = planned(), planned(gradient_checkpointing=True)
    student = Estimate(plain).student_costs
    head = 2 * 32 * 96
    forward = student.forward_flops_per_token(128)
    assert Estimate(again).token_flops() - Estimate(plain).token_flops() == forward - head


class TestChoice:
    """What is recomputed and how many sequences go through at a time, where a spec leaves it open."""

    def test_what_fits_is_not_recomputed(self, planned: Planned) -> None:
        estimate = Estimate(planned())
        assert estimate.recomputation is False and estimate.layout(1).recompute is False
        assert Estimate(planned(gradient_checkpointing=True)).recomputation is True

    def test_the_least_that_fits_is_chosen(self, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
        """For devices whose memory lies just at each need."""
        plan = planned(micro_batch_size=4, layout={"student": "replicated", "teacher": "replicated"})
        needs = {}
        for way in WAYS:
            estimate = Estimate(plan)
            needs[way] = estimate.training("cuda", replace(estimate.layout(1), recompute=way)).peak
        assert needs[True] < needs["attention"] < needs[False]
        for way in WAYS:
            monkeypatch.setattr(choice, "REFERENCE", Device("small", needs[way], 1.0))
            assert Estimate(plan).recomputation == way
            assert Estimate(plan).layout(1).recompute == way
        monkeypatch.setattr(choice, "REFERENCE", Device("none", 1, 1.0))
        assert Estimate(plan).recomputation is True, "what takes least, where nothing fits"

    def test_candidates_of_a_search_leave_room_for_the_branch_that_judges_them(
        self, planned: Planned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = planned(micro_batch_size=4)
        estimate = Estimate(plan)
        alone = estimate.training("cuda", estimate.layout(1))
        states = alone.parts["weights"] + alone.parts["gradients"] + alone.parts["optimizer"]
        for room, recomputes in ((0, False), (-1, True)):
            monkeypatch.setattr(choice, "REFERENCE", Device("small", alone.peak + states + room, 1.0))
            assert Estimate(plan).recomputation is False
            assert (Estimate(plan).candidate.recompute is not False) is recomputes
        monkeypatch.undo()
        rungs = ({"number": 1, "tokens": 8_000, "enter": 5, "leave": 1},)
        searched = replace(plan, search={"rungs": rungs})
        need = next(one for one in plan_document(searched)["phases"] if one["name"] == "search")["peak_memory_bytes"]
        logits = 4 * 128 * 96 * 4
        assert need == alone.peak + 9 * states + logits, "five trunks and their branches learn together where they fit"
        tight = Device("card", alone.peak + 2 * states, 1e12)
        ((grouped,),) = [[one for one in Estimate(searched).phases(on(tight)) if one.name == "search"]]
        assert grouped.memory.peak < need
        assert fits(searched, alone.peak + states)["reason"].startswith("search needs")

    def test_an_open_micro_batch_shrinks_before_anything_is_recomputed(
        self, planned: Planned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(choice, "LEAST_TOKENS", 1)
        plan = planned(layout={"student": "replicated", "teacher": "replicated"})
        estimate = Estimate(plan)
        wide = estimate.micro_batch
        assert wide == 16
        need = estimate.training("cuda", replace(estimate.layout(1), micro_batch=4, steps=4)).peak
        monkeypatch.setattr(choice, "REFERENCE", Device("small", need, 1.0))
        narrow = Estimate(plan)
        assert (narrow.recomputation, narrow.micro_batch) == (False, 4)
        assert narrow.micro_batches == [4]

    def test_a_bound_that_costs_nothing_is_one(self, planned: Planned) -> None:
        for distill in (
            {},
            {"weights": "bfloat16", "optimizer": {"states": "int8"}},
            {"teacher_logits": {"sampled": 3}},
        ):
            estimate = Estimate(planned(**distill))
            for devices in (1, 8):
                layout = estimate.layout(devices)
                assert estimate._least_memory(layout) <= estimate.training("cuda", layout).peak

    @given(st.integers(1, 4096), st.integers(2, 1 << 15))
    def test_micro_batches_are_divisors_from_the_largest_down(self, batch: int, length: int) -> None:
        sizes = list(choice.micro_batches(batch, length, micro_batch(batch, length)))
        assert sizes == sorted(set(sizes), reverse=True) and all(batch % size == 0 for size in sizes)
        assert sizes[0] == micro_batch(batch, length)
        assert all(size * length >= choice.LEAST_TOKENS for size in sizes[1:])
