"""`recovery.merge_experts`: a dropped expert is aligned with the kept one that does the nearest, and averaged with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.estimate.activations import Living
from minitron.compiler.estimate.all_costs import all_costs
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.recovery_phases import assignment_seconds
from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.compiler.importance.scores import Seen
from minitron.compiler.plan.plan import Plan
from minitron.compiler.recovery.merged_experts import (
    Joined,
    MergedExperts,
    MergedLayer,
    align,
    group_experts,
    merge_layer,
)
from minitron.compiler.recovery.refit import RIDGE
from minitron.compiler.roles.expert_weights import find_expert_weights, neurons_of
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.compiler.verify_build import verify_build
from minitron.compiler.weights.source import WeightSource, open_weights
from minitron.specs.data_files import resolve
from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.progress import Silent
from tests.foundry import Build, Foundry, executor, load_model, token_ids

MERGE = {"merge_experts": True}
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"]
"""Gate and up side by side; interleaved, with biases; groups of experts; every expert over every token."""


def opened(foundry: Foundry, family: str) -> tuple[Plan, int, WeightSource]:
    """A teacher of two layers, the last of which has experts, and its weights."""
    plan = foundry.whole(family, num_hidden_layers=2)
    return plan, 1, open_weights(plan.teacher.captured, plan.checkpoint)


def shuffled(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).permutation(count).astype(np.int64)


def run(plan: Plan, source: WeightSource) -> torch.Tensor:
    found: list[torch.Tensor] = []
    executor(plan, source.get).run([token_ids(2, 20)], output=lambda value, _: found.append(value))
    return found[0]


# -- alignment ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_in_any_order_the_neurons_of_an_expert_compute_the_same(foundry: Foundry, family: str) -> None:
    plan, layer, source = opened(foundry, family)
    weights = find_expert_weights(plan.teacher.table, plan.teacher.roles, layer)
    count = weights.channels.size.coefficient
    moved = {one: [Joined(one, 1.0, shuffled(one, count))] for one in range(weights.count)}
    other = MergedExperts(source, plan.teacher.table, {layer: MergedLayer(weights, moved)})
    changed = [name for name in plan.teacher.table.parameters if not torch.equal(source.get(name), other.get(name))]
    inside = {name for name in weights.axes if name not in changed}
    assert len(changed) >= 2 and all("down_proj_bias" in name for name in inside), "a bias behind them has no neurons"
    torch.testing.assert_close(run(plan, other), run(plan, source), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_joins_its_double_changes_nothing(foundry: Foundry, family: str) -> None:
    """Expert 2 is made a copy of expert 0 with its neurons shuffled: merged into it, 0 is what it was."""
    plan, layer, source = opened(foundry, family)
    table = plan.teacher.table
    weights = find_expert_weights(table, plan.teacher.roles, layer)
    own = np.arange(weights.channels.size.coefficient)
    double = {2: [Joined(0, 1.0, shuffled(5, len(own)))]}
    twins = MergedExperts(source, table, {layer: MergedLayer(weights, double)})
    made = merge_layer(twins, table, weights, {0: [2]}, np.array([3, 1, 6, 2, 0, 0][: weights.count], dtype=np.float32))
    assert [one.share for one in made.experts[0]] == [3 / 9, 6 / 9]
    merged = MergedExperts(twins, table, {layer: made})
    for name in table.parameters:
        torch.testing.assert_close(merged.get(name), twins.get(name), rtol=1e-6, atol=1e-7)
    assert (made.experts[0][1].order[double[2][0].order] == own).all(), "it was put back in order"


def test_the_router_is_not_an_experts_own(foundry: Foundry) -> None:
    for family in FAMILIES:
        plan, layer, _ = opened(foundry, family)
        names = find_expert_weights(plan.teacher.table, plan.teacher.roles, layer).axes
        own = {"gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if family == "gpt_oss" else ())}
        assert {name.rpartition(".")[2] for name in names} == own and set(names.values()) == {0}


def test_the_neuron_of_every_index(foundry: Foundry) -> None:
    for family, expected in {
        "mixtral": lambda index, count: index % count,
        "gpt_oss": lambda index, count: index // 2,
    }.items():
        plan, layer, _ = opened(foundry, family)
        table = plan.teacher.table
        channels = find_expert_weights(table, plan.teacher.roles, layer).channels
        (name,) = (one for one in table.parameters if f".{layer}." in one and one.endswith("gate_up_proj"))
        (dim,) = (one for one in table.parameters[name][1:] if channels in table.space.leaves(one))
        found = neurons_of(table.space, channels, dim)
        count = channels.size.coefficient
        assert len(found) == Narrowing(table.space).count(dim) == 2 * count
        assert found.tolist() == [expected(index, count) for index in range(2 * count)]


# -- who joins whom -------------------------------------------------------------------------------------------------------


def test_the_nearest_of_the_kept_takes_it_in() -> None:
    outputs = np.array([[0.0, 0.0], [4.0, 0.0], [3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [9.0, 9.0]], dtype=np.float32)
    seen = Seen(np.array([5, 5, 5, 5, 5, 5], dtype=np.float32), outputs)
    assert group_experts(seen, [0, 1]) == {0: [3, 4], 1: [2, 5]}, "of equally near ones the lower number"


def test_experts_without_tokens_join_none_and_take_none() -> None:
    outputs = np.zeros((4, 2), dtype=np.float32)
    assert group_experts(Seen(np.array([0, 7, 3, 0], dtype=np.float32), outputs), [0, 1]) == {1: [2]}
    assert group_experts(Seen(np.array([0, 0, 3, 0], dtype=np.float32), outputs), [0, 1]) == {}


# -- students -------------------------------------------------------------------------------------------------------------


def compiled(foundry: Foundry, family: str, student: dict[str, Any], **recovery: Any) -> Build:
    teacher = foundry.teacher(family, num_hidden_layers=2)
    return foundry.build(teacher, student, program=False, recovery={**MERGE, **recovery})


@pytest.mark.parametrize(
    ("family", "student"),
    [
        ("gpt_oss", {"num_experts": 3}),
        ("deepseek_v3", {"num_experts": 4, "moe_intermediate_size": 16}),
        ("llama4_text", {"num_experts": 4}),
    ],
)
def test_students_of_all_forms_pass_their_checks(foundry: Foundry, family: str, student: dict[str, Any]) -> None:
    merged = compiled(foundry, family, student)
    assert all(check["passed"] for check in merged.checks.values()) and merged.checks["masked"]["exact"]


def samples_of(build: Build) -> torch.Tensor:
    data = build.loaded.spec.importance.data
    assert data is not None
    size = SampleConfig(data.samples, data.sequence_length)
    found = resolve(data, build.loaded.folder, at="importance.data")
    return calibration_samples(found, load_tokenizer(build.teacher), build.config["vocab_size"], size)


def test_a_students_experts_are_the_weighted_means_of_aligned_ones(foundry: Foundry) -> None:
    """Worked out from the modules of transformers: tokens and outputs by hooks, alignment and mean by hand."""
    build = compiled(foundry, "mixtral", {"num_experts": 2})
    model, given = load_model(build.teacher), list[Any]()
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: given.append((module, *inputs)))
    with torch.no_grad():
        model(input_ids=samples_of(build), use_cache=False)
    scores, joined = build.tensors_of("scores.safetensors"), 0
    merged = [layer.mlp for layer in load_model(build.folder / "student").model.layers]
    for number, (module, x, chosen, routed) in enumerate(given):
        gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
        tokens, outputs = [], []
        for expert in range(4):
            rows, place = torch.where(chosen == expert)
            gate, up = (x[rows] @ gate_up[expert].T).chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * up) @ down[expert].T * routed[rows, place, None]
            tokens.append(float(len(rows)))
            outputs.append(out.detach().mean(0) if len(rows) else out.new_zeros(out.shape[1]))
        assert scores[f"expert_tokens.{number}"].tolist() == tokens
        torch.testing.assert_close(scores[f"expert_outputs.{number}"], torch.stack(outputs), rtol=1e-4, atol=1e-6)
        kept = build.document("plan.json")["selection"]["num_experts"][number]
        for place, expert in enumerate(kept):
            group = [expert] + [
                one for one in range(4)
                if one not in kept and tokens[one] > 0
                and min(kept, key=lambda other: float((outputs[one] - outputs[other]).norm())) == expert
            ]  # fmt: skip
            joined += len(group) - 1
            up_down = [torch.cat([*gate_up[one].chunk(2), down[one].T], 1) for one in group]
            orders = [linear_sum_assignment((up_down[0] @ one.T).numpy(), maximize=True)[1] for one in up_down]
            shares = [tokens[one] / sum(tokens[other] for other in group) for one in group]
            mean = sum(share * one[order] for share, one, order in zip(shares, up_down, orders, strict=True))
            assert isinstance(mean, torch.Tensor)
            stored = torch.cat(
                [*merged[number].experts.gate_up_proj[place].chunk(2), merged[number].experts.down_proj[place].T], 1
            )
            torch.testing.assert_close(stored.detach(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(merged[number].gate.weight, model.model.layers[number].mlp.gate.weight[kept])
    assert joined, "no expert joined another one"


def test_verified_again_and_another_student(foundry: Foundry, tmp_path: Path) -> None:
    """On the rotated teacher, too."""
    student = {"hidden_size": 32, "num_experts": 2}
    blocks: dict[str, Any] = {"importance": {"data": foundry.calibration, "hidden_basis": "principal"}}
    teacher = foundry.teacher("mixtral", num_hidden_layers=2, hidden_size=48)
    loaded = foundry.load(teacher, student, recovery=MERGE, **blocks)
    build = foundry.compile(loaded, tmp_path / "build")
    with foundry.shortened():
        verify_build(build.folder, device="cpu", progress=Silent())
    assert {"weights", "selection", "rotation"} <= Build(build.folder, loaded, build.plan).checks.keys()
    detail = Build(build.folder, loaded, build.plan).checks["weights"]["detail"]
    assert detail.endswith("the teacher's that plan.json keeps, as basis and recovery have changed it")
    plain = foundry.build(teacher, student, program=False, **blocks)
    assert plain.document("plan.json")["fingerprint"] != build.document("plan.json")["fingerprint"]
    assert plain.document("plan.json")["selection"] == build.document("plan.json")["selection"]


def test_a_refit_beside_it_fits_to_the_teacher(foundry: Foundry) -> None:
    """The router of the second layer, from what modules of transformers read there in teacher and student."""
    build = compiled(foundry, "mixtral", {"num_experts": 2}, refit="least_squares")
    assert all(check["passed"] for check in build.checks.values())
    read = []
    for folder in (build.teacher, build.folder / "student"):
        model = load_model(folder)
        model.model.layers[1].mlp.gate.register_forward_pre_hook(
            lambda module, inputs: read.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double())
        )
        with torch.no_grad():
            model(input_ids=samples_of(build), use_cache=False)
    theirs, own = read
    assert (theirs - own).abs().max() > 1e-3, "what the experts of the first layer yield has changed"
    kept = build.document("plan.json")["selection"]["num_experts"][1]
    sliced = load_model(build.teacher).model.layers[1].mlp.gate.weight.detach().double()[kept]
    gram = own.T @ own
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    fitted = sliced + (sliced @ theirs.T - sliced @ own.T) @ own @ torch.linalg.inv(gram + ridge)
    stored = load_model(build.folder / "student").model.layers[1].mlp.gate.weight.detach().double()
    torch.testing.assert_close(stored, fitted, rtol=1e-3, atol=1e-4)
    assert (stored - sliced).abs().max() > 1e-3


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_a_teacher_without_experts(foundry: Foundry) -> None:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(foundry.teacher("llama"), {"intermediate_size": 24}, recovery=MERGE)
    (error,) = caught.value.errors
    assert error.path == "recovery.merge_experts" and error.hint == "write false or leave it out"
    assert error.message == "this llama has no experts"


def test_channels_that_are_not_an_experts_own(foundry: Foundry) -> None:
    plan, layer, _ = opened(foundry, "mixtral")
    roles = plan.teacher.roles
    widths = {name: {i: replace(one, parents=()) for i, one in of.items()} for name, of in roles.widths.items()}
    with pytest.raises(UsageError, match=r"layer 1: the graph does not show that the channels of each expert are its"):
        find_expert_weights(plan.teacher.table, replace(roles, widths=widths), layer)


def test_experts_that_have_no_slice_of_their_own(foundry: Foundry) -> None:
    plan, layer, _ = opened(foundry, "mixtral")
    table, roles = plan.teacher.table, plan.teacher.roles
    name = f"model.layers.{layer}.mlp.experts.down_proj"
    experts, hidden, channels = table.parameters[name]
    fused = replace(table, parameters={**table.parameters, name: [(*experts, *hidden), channels]})
    with pytest.raises(UsageError, match=rf"{name}: an expert has no slice of its own in it"):
        find_expert_weights(fused, roles, layer)


def test_no_expert_is_dropped(foundry: Foundry) -> None:
    plan = foundry.plan(foundry.teacher("mixtral"), {"intermediate_size": 24}, recovery=MERGE)
    assert not plan.merges_experts
    assert any(one.startswith("merge_experts changes nothing here") for one in plan.remarks)


# -- the plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_alignment_holds_what_the_plan_says(foundry: Foundry, family: str) -> None:
    """However many experts are dropped: one pair at a time."""
    count = 320
    teacher = foundry.teacher(family, num_hidden_layers=2, intermediate_size=count)
    plan = foundry.plan(teacher, {"num_experts": 2}, recovery=MERGE)
    source = open_weights(plan.teacher.captured, plan.checkpoint)
    weights = find_expert_weights(plan.teacher.table, plan.teacher.roles, 1)
    dropped = weights.count - plan.targets.widths["num_experts"]
    with Living() as living:
        align(source, plan.teacher.table, weights, [(0, one) for one in range(weights.count - dropped, weights.count)])
    hardware = HardwareAssumptions()
    phases = {phase.name: phase for phase in Estimate(plan).phases(hardware)}
    merging = phases["merge_experts"]
    # The copy in fp64 that scipy makes is none of torch's.
    assert living.peak == pytest.approx(merging.memory.peak - 8 * count**2, rel=0.15)
    assert merging.memory.parts["matrices"] < 2 * 12 * count**2
    assert merging.waiting == pytest.approx(2 * dropped * assignment_seconds(count))
    assert assignment_seconds(14336) == pytest.approx(30, rel=0.05)
    neuron = (2 * 3 * plan.teacher.roles.hidden.size + (2 * 2 if family == "gpt_oss" else 0)) * count
    assert merging.flops >= 2 * dropped * count * neuron
    assert merging.to_json(hardware)["device_hours"] == pytest.approx(merging.waiting / 3600, abs=1e-5)
    costs = {cost.name: cost for cost in all_costs(Estimate(plan), hardware)}
    assert costs["merge experts: work"].value == merging.flops and "merge experts: tokens" not in costs
    without = foundry.plan(teacher, {"num_experts": 2})
    assert "merge_experts" not in {phase.name for phase in Estimate(without).phases(hardware)}
