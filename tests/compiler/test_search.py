"""A search before any weight is read: the grid, its prices, the budget, the spread, and what more tokens will buy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from minitron.compiler.estimate.devices import DEVICES
from minitron.compiler.estimate.plan_costs import plan_costs
from minitron.compiler.plan.plan import open_spec
from minitron.compiler.roles.names import LAYERS
from minitron.compiler.search.candidates import Candidates, choose_candidates
from minitron.compiler.search.forecast import forecast
from minitron.compiler.search.grid import MOST_SHAPES, Grid, completed, make_grid, thinned
from minitron.compiler.search.pricing import Prices, Pricing
from minitron.compiler.search.spread import farthest_first, largest, most_even
from minitron.compiler.search.workload import check_workload, served
from minitron.specs import SpecInvalid
from minitron.specs.blocks.search import Workload
from minitron.specs.blocks.student import Student
from tests.foundry import Foundry

DISTILL = {"tokens": 200_000, "sequence_length": 16, "global_batch_size": 4}


def search_blocks(foundry: Foundry, search: dict[str, Any], **distill: Any) -> dict[str, Any]:
    """The blocks of a spec with a search."""
    (foundry.root / "valid.txt").write_text("the cat sat on a mat\n", encoding="utf-8")
    text = [str(foundry.root / "corpus.txt")]
    return {
        "search": search,
        "distill": {"data": {"text": text, "document": "line"}} | DISTILL | distill,
        "evaluate": {"held_out": {"text": [str(foundry.root / "valid.txt")]}},
    }


def chosen(
    foundry: Foundry, search: dict[str, Any], student: dict[str, Any], family: str = "llama", **distill: Any
) -> Candidates:
    loaded = foundry.load(foundry.teacher(family), student, **search_blocks(foundry, search, **distill))
    with foundry.shortened():
        return choose_candidates(loaded, open_spec(loaded, weights=False))


# --- prices ---

SHAPES: dict[str, list[dict[str, int]]] = {
    "llama": [
        {"hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
        {"num_key_value_heads": 1},
    ],
    "gemma2": [{"hidden_size": 24, "intermediate_size": 16}, {"num_hidden_layers": 2, "num_attention_heads": 2}],
    "qwen3_moe": [{"hidden_size": 24, "num_experts": 4, "moe_intermediate_size": 16}, {"num_hidden_layers": 1}],
    "phi3": [{"hidden_size": 24, "intermediate_size": 24, "num_key_value_heads": 1}],
}


@pytest.mark.parametrize("family", SHAPES)
def test_prices_are_those_of_the_plan(foundry: Foundry, family: str) -> None:
    for student in SHAPES[family]:
        plan = foundry.plan(foundry.teacher(family), student)
        teacher, exact = plan_costs(plan)
        pricing = Pricing(plan.teacher, 4)
        asked = {name: np.array([width]) for name, width in {**student, LAYERS: plan.targets.layers}.items()}
        shapes, possible = completed(asked, plan.teacher, {})
        assert possible.all()
        whole, _ = completed({LAYERS: np.array([plan.teacher.captured.layer_count])}, plan.teacher, {})
        for costs, prices in ((exact, pricing.prices(shapes)), (teacher, pricing.prices(whole))):
            assert (
                costs.parameters,
                costs.active_parameters,
                costs.weight_bytes,
                costs.kv_cache_bytes_per_token,
                costs.flops_per_token,
                costs.attention_flops_per_pair,
            ) == tuple(int(of[0]) for of in vars(prices).values())


# --- the grid ---


def test_a_grid_is_proposed_on_every_axis_that_can_be_narrowed(foundry: Foundry) -> None:
    teacher = foundry.whole("llama").teacher
    grid, problems = make_grid(Student(), teacher, proposes=True)
    assert not problems and not grid.written
    assert grid.values == {
        "hidden_size": (8, 16, 24, 32),
        "intermediate_size": (16, 24, 32, 40),
        "num_attention_heads": (2, 4),
        "num_key_value_heads": (1, 2),
        "num_hidden_layers": (2, 3),
    }
    fixed, _ = make_grid(Student(hidden_size=24), teacher, proposes=True)
    assert fixed.values["hidden_size"] == (24,) and len(fixed.values) == 5
    listed, _ = make_grid(Student(hidden_size=(24, 32)), teacher, proposes=True)
    assert listed.values == {"hidden_size": (24, 32)} and listed.written


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_a_grid_is_thinned_to_what_can_be_priced_and_keeps_its_ends(lengths: list[int]) -> None:
    grid = Grid({str(axis): tuple(range(1, length + 1)) for axis, length in enumerate(lengths)}, False)
    few = thinned(grid)
    assert few.size <= MOST_SHAPES
    for name, values in few.values.items():
        assert values[0] == grid.values[name][0] and values[-1] == grid.values[name][-1]
        assert set(values) <= set(grid.values[name])


@given(arrays.arrays(np.bool_, arrays.array_shapes(min_dims=1, max_dims=4, max_side=5)))
def test_the_largest_are_those_that_no_larger_one_along_an_axis_is_beside(inside: np.ndarray[Any, Any]) -> None:
    found = largest(inside.reshape(-1), inside.shape).reshape(inside.shape)
    for place in np.ndindex(inside.shape):
        beyond = False
        for axis, at in enumerate(place):
            line = [slice(one, one + 1) for one in place]
            line[axis] = slice(at + 1, None)
            beyond |= bool(inside[tuple(line)].any())
        assert found[place] == (inside[place] and not beyond)


@settings(max_examples=50)
@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.floats(0.1, 1.0)))
def test_points_are_spread(points: np.ndarray[Any, Any]) -> None:
    order = list(farthest_first(points, most_even(points)))
    assert sorted(order) == list(range(len(points)))
    span = np.ptp(points, axis=0)
    scaled = points / np.where(span > 0, span, 1.0)
    for count in range(1, len(order)):
        before = scaled[order[:count]]
        distance = [np.square(scaled[one] - before).sum(axis=1).min() for one in order[count:]]
        assert np.isclose(distance[0], max(distance))


# --- the budget ---


def test_the_funnel_counts_shapes_and_every_candidate_is_within(foundry: Foundry) -> None:
    search = {"budget": {"parameters": 15_000, "tolerance": "10%", "kv_cache": 256}, "candidates": 4}
    found = chosen(foundry, search, {})
    words = {stage.words: stage.shapes for stage in found.funnel}
    assert words["in the grid"] == 4 * 4 * 2 * 2 * 2
    assert words["enter the first rung"] == len(found.found) == 4
    assert words["15K parameters, 10% more or less"] >= words["within all of these"] >= 4
    for one in found.found:
        assert abs(one.costs.parameters - 15_000) <= 1_500 and one.costs.kv_cache_bytes_per_token <= 256
    assert len({tuple(one.written.values()) for one in found.found}) == 4
    assert [one.number for one in found.found] == [1, 2, 3, 4]
    assert [(rung.enter, rung.leave) for rung in found.rungs] == [(4, 3), (3, 2), (2, 1)]
    again = chosen(foundry, search, {})
    assert again == found


def test_rates_and_batches_are_tried_on_every_shape(foundry: Foundry) -> None:
    search = {"budget": {"memory": "90KB"}, "candidates": 8}
    student = {"hidden_size": [16, 24], "intermediate_size": 40}
    found = chosen(foundry, search, student, optimizer={"lr": [1e-3, 2e-3]}, global_batch_size=[2, 4]).found
    assert {(one.written["hidden_size"], one.lr, one.global_batch_size) for one in found} == {
        (hidden, lr, batch) for hidden in (16, 24) for lr in (1e-3, 2e-3) for batch in (2, 4)
    }
    one_shape = chosen(foundry, {"candidates": 3}, {"hidden_size": 24}, optimizer={"lr": {"min": 1e-3, "max": 8e-3}})
    assert {one.lr for one in one_shape.found} < {1e-3, 2e-3, 4e-3, 8e-3} and len(one_shape.found) == 3
    assert len({one.written["hidden_size"] for one in one_shape.found}) == 1


def test_the_spec_of_a_candidate_is_concrete_and_keeps_the_hash(foundry: Foundry) -> None:
    blocks = search_blocks(foundry, {"candidates": 3}, optimizer={"lr": [1e-3, 2e-3, 4e-3], "warmup_steps": 500})
    loaded = foundry.load(foundry.teacher("llama"), {"hidden_size": 24}, **blocks)
    with foundry.shortened():
        found = choose_candidates(loaded, open_spec(loaded, weights=False))
    own = found.found[1].spec(loaded, found.first_rung)
    assert own.spec.search is None and own.spec.distill is not None and own.sha256 == loaded.sha256
    assert own.spec.distill.adamw.lr == found.found[1].lr
    steps = found.first_rung // (16 * 4)
    assert own.spec.distill.adamw.warmup_steps == int(0.2 * steps), "a rung is not all warm-up"


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "budgets that contradict": (
        {"budget": {"parameters": 20_000, "kv_cache": 64}},
        {},
        r"search\.budget: no shape of \d+ is within the budget; the nearest is \{hidden_size: .*\}, whose ",
    ),
    "a budget out of reach": (
        {"budget": {"parameters": 100}},
        {},
        r"search\.budget\.parameters: no shape of \d+ .* is not 100 parameters, 5% more or less; write another limit",
    ),
    "a budget of everything": (
        {"budget": {"memory": "1GB"}},
        {},
        "search.budget: the teacher itself is within the budget",
    ),
    "an empty grid": (
        {"budget": {"memory": "1GB"}},
        {"num_attention_heads": [1, 3]},
        "student: none of the 2 combinations can be built: query heads do not divide into their groups",
    ),
    "a width beyond the teacher": (
        {"budget": {"memory": "1GB"}},
        {"hidden_size": [24, 64]},
        r"student\.hidden_size\.1: 64 is not between 1 and the teacher's 32; write at most 32",
    ),
    "an axis that the teacher has not": (
        {"budget": {"memory": "1GB"}},
        {"num_experts": [2, 4]},
        r"student\.num_experts: the teacher \(llama\) has no num_experts; leave it out",
    ),
    "an axis that cannot be narrowed": (
        {"budget": {"memory": "1GB"}},
        {"head_dim": [4, 8]},
        r"student\.head_dim\.0: cannot be narrowed: .*; leave it out, or write 8",
    ),
    "a device that nobody knows": (
        {"budget": {"workload": {"input": 100, "output": 10, "device": "h10"}}},
        {},
        r"search\.budget\.workload\.device: `h10` is not a device whose bandwidth is known; did you mean `h100`\?",
    ),
}


@pytest.mark.parametrize(("search", "student", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_no_teacher_can_give(
    foundry: Foundry, search: dict[str, Any], student: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecInvalid, match=message):
        chosen(foundry, search, student)


def test_a_workload_is_bounded_by_bandwidth_or_by_the_peak() -> None:
    """The roofline by hand: one request reads the weights for each token; many share the reading and multiply."""
    one = np.array([1], np.int64)
    prices = Prices(one, one, 10**10 * one, 10**5 * one, 2 * 10**10 * one, 0 * one)
    device = DEVICES["h100"]
    alone = served(Workload(input=1000, output=1000, concurrency=1, device="h100"), prices)
    read = (10**10 + 1500 * 10**5) / device.bandwidth
    prefill = 1000 * 2 * 10**10 / device.flops / 1000
    assert alone.milliseconds[0] == pytest.approx(1e3 * (read + prefill))
    assert alone.memory[0] == 10**10 + 2000 * 10**5
    crowd = served(Workload(input=1, output=1, concurrency=10_000, device="h100"), prices)
    assert crowd.milliseconds[0] == pytest.approx(1e3 * 2 * 10_000 * 2 * 10**10 / device.flops)
    assert not check_workload(None) and not check_workload(Workload(input=1, output=1, device="h200"))


# --- what more tokens will buy ---


@settings(max_examples=40)
@given(st.floats(0.0, 0.5), st.floats(0.2, 1.0), st.floats(0.1, 2.0))
def test_a_law_is_found_again(floor: float, exponent: float, last: float) -> None:
    points = [(d, floor + last * (d / 64_000) ** -exponent) for d in (4_000, 8_000, 16_000, 32_000, 64_000)]
    found = forecast(points, 256_000)
    assert found is not None and found.error < 0.02
    truth = floor + last * 4**-exponent
    assert found.low * 0.98 <= truth <= found.high * 1.02
    assert found.kl == pytest.approx(truth, rel=0.15)
    assert found.low <= found.kl <= found.high < points[-1][1] * 1.03


def test_one_figure_is_no_law() -> None:
    assert forecast([(1000, 0.5)], 10_000) is None
    assert forecast([(1000, 0.5), (2000, 0.0)], 10_000) is None
