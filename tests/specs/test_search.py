"""The block `search`: what it may choose among, what it needs, and how the field is cut down."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs import load_spec
from minitron.specs.blocks.choices import RATE_FACTOR, rates, sizes
from minitron.specs.halving import GROWTH, branch_steps, halving
from minitron.specs.search_files import search_identity
from minitron.specs.units import Share, Span
from tests.specs.conftest import Errors, Load
from tests.specs.specimens import SEARCH, SMALL

LISTS = SMALL.replace("48", "[32, 48]")


def training(more: str) -> str:
    """A search of two widths whose training has one key more."""
    return LISTS.replace("1B", f"1B, {more}") + SEARCH


def width(value: str) -> str:
    """A search of this hidden size."""
    return SMALL.replace("48", value) + SEARCH


def asking(search: str, widths: str = LISTS) -> str:
    """A spec with this `search`."""
    return widths + SEARCH.replace("{budget: {memory: 1GiB}}", search)


def test_values_are_lists_or_ranges(load: Load, tmp_path: Path) -> None:
    text = SMALL.replace("48", '{min: "50%", max: 96, step: 16}, num_hidden_layers: {min: 4, max: 8}')
    text = text.replace("tokens: 1B", "tokens: 1B, optimizer: {lr: {min: 1e-3, max: 8e-3}}, global_batch_size: [8, 16]")
    loaded = load(text + SEARCH)
    assert dict(loaded.spec.student.targets()) == {
        "hidden_size": Span(Share.parse("50%"), 96, 16),
        "num_hidden_layers": Span(4, 8),
    }
    assert loaded.spec.distill is not None
    assert rates(loaded.spec.distill.optimizer.lr) == (1e-3, 2e-3, 4e-3, 8e-3)
    assert sizes(loaded.spec.distill.global_batch_size) == (8, 16)
    again = tmp_path / "resolved.yaml"
    again.write_text(json.dumps(loaded.resolved))
    assert load_spec(again).sha256 == loaded.sha256


def test_a_budget_proposes_shapes_and_one_shape_finds_a_rate(load: Load) -> None:
    assert not list(load(SMALL.replace("{hidden_size: 48}", "{}") + SEARCH).spec.student.targets())
    text = SMALL.replace("tokens: 1B", "tokens: 1B, optimizer: {lr: [1e-4, 2e-4]}")
    search = load(text + SEARCH.replace("{budget: {memory: 1GiB}}", "{candidates: 2}")).spec.search
    assert search is not None and search.budget is None


def test_hidden_states_may_be_compared(load: Load) -> None:
    for hidden in ("{coordinates: kept}", "{pairs: last:last}", "{pairs: [[5, 3]]}"):
        assert load(training(f"loss: {{hidden_states: {hidden}}}")).spec.search is not None


def test_the_length_of_a_training_is_the_search_s_where_a_weight_falls_over_it(load: Load) -> None:
    def identities(hidden: str) -> set[str]:
        text = training(f"loss: {{hidden_states: {hidden}}}, optimizer: {{warmup_steps: 5}}")
        rank = text.replace("{budget: {memory: 1GiB}}", "{budget: {memory: 1GiB}, rank: {tokens: 100M}}")
        return {search_identity(load(one)) for one in (rank, rank.replace("tokens: 1B", "tokens: 2B"))}

    assert len(identities("{coordinates: kept}")) == 2
    assert len(identities("{coordinates: kept, schedule: constant}")) == 1


def test_rungs_that_are_not_written_take_a_quarter_of_the_tokens(load: Load) -> None:
    search = load(LISTS + SEARCH).spec.search
    assert search is not None and search.rank.tokens == 250_000_000
    written = load(asking("{budget: {memory: 1GiB}, rank: {tokens: 400M}}")).spec.search
    assert written is not None and written.rank.tokens == 400_000_000


WRONG = {
    "a range without a search": (
        SMALL.replace("48", "{min: 32, max: 48}"),
        "3:11: student.hidden_size: a range of widths needs `search`; write one width, or add `search:`",
    ),
    "rates without a search": (
        SMALL.replace("1B", "1B, optimizer: {lr: [1e-3, 2e-3]}"),
        "distill.optimizer.lr: a list of learning rates needs `search`; write one learning rate, or add `search:`",
    ),
    "batches without a search": (
        SMALL.replace("1B", "1B, global_batch_size: {min: 8, max: 16}"),
        "distill.global_batch_size: a range of batch sizes needs `search`",
    ),
    "nothing to choose": (
        asking("{candidates: 4}", SMALL),
        "6:1: search: there is one shape and one learning rate, and nothing to choose among; add `budget:",
    ),
    "shapes without a budget": (
        asking("{candidates: 4}"),
        "search: several shapes need a budget: without a limit the largest would always win; add `budget:`",
    ),
    "nothing to judge on": (
        LISTS + SEARCH.split("\n")[0],
        "search: candidates are judged on held-out text, which is missing; add `evaluate: {held_out:",
    ),
    "rungs longer than the training": (
        asking("{budget: {memory: 1GiB}, rank: {tokens: 2B}}"),
        "search.rank.tokens: the rungs are 2B tokens long, and the training that goes on from them is 1B; write at most",
    ),
    "a first rung of less than a batch": (
        asking("{budget: {memory: 1GiB}, rank: {tokens: 10M}}"),
        "search.rank.tokens: the first of 3 rungs has 2.5M tokens, less than one global batch, 3145728 tokens; write at",
    ),
    "rungs without end": (
        asking("{budget: {memory: 1GiB}, rank: {rungs: 1.5B}}"),
        "search.rank.rungs: `1.5B` is out of range; write a number of at most 20",
    ),
    "pairs of layers that not every candidate has": (
        training("loss: {hidden_states: {pairs: [[5, 3]]}}").replace("[32, 48]", "48, num_hidden_layers: [4, 6]"),
        "distill.loss.hidden_states.pairs: the pairs name layers of one student, and candidates have other numbers of "
        "layers; write all or last:last, or one `num_hidden_layers`",
    ),
    "stored samples": (
        training("teacher_logits: {sampled: 4}"),
        "distill.teacher_logits: candidates are trained beside the teacher itself",
    ),
    "phases": (
        training("phases: [{tokens: 600M}, {tokens: 400M}]"),
        "distill.phases: candidates are trained on sequences of one length in one batch size",
    ),
    "weights in host memory": (
        training("layout: {cpu_offload: true}"),
        "distill.layout.cpu_offload: candidates are trained whole on their device; write false",
    ),
    "two batches and a corrected teacher": (
        LISTS.replace("1B", "1B, global_batch_size: [8, 16]") + "teacher_correction: {tokens: 1B}\n" + SEARCH,
        "distill.global_batch_size: the teacher is corrected before the search, in batches of one size",
    ),
    "a range without an end": (
        width("{min: 32}"),
        "student.hidden_size: the range has no `max`; write {min: 1024, max: 4096, step: 256}",
    ),
    "a range with a wrong key": (
        width("{min: 32, max: 48, stop: 8}"),
        "unknown key `stop` of a range; did you mean `step`? write {min",
    ),
    "a range backwards": (width("{min: 48, max: 32}"), "the range begins at 48 and ends at 32"),
    "shares backwards": (width("{min: 80%, max: 50%}"), "the range begins at 80% and ends at"),
    "a step of nothing": (width("{min: 8, max: 32, step: 0}"), "`step` is not a whole number"),
    "no rate": (
        training("optimizer: {lr: [0, 1e-3]}"),
        "distill.optimizer.lr: `0` is not a learning rate; write a number greater than 0",
    ),
    "half a sequence": (
        training("global_batch_size: {min: 0.5, max: 8}"),
        "distill.global_batch_size: `0.5` is not a number of sequences; write a whole number of at least 1",
    ),
    "no batch": (
        training("global_batch_size: []"),
        "distill.global_batch_size: the list is empty; write the batch sizes to try",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_a_search_cannot_be(errors_of: Errors, text: str, message: str) -> None:
    (error,) = errors_of(text)
    assert message in str(error)


def test_all_mistakes_of_a_search_come_at_once(errors_of: Errors) -> None:
    text = LISTS.replace("1B", "1B, teacher_logits: {sampled: 4}") + "search: {budget: {}}\n"
    assert {error.path for error in errors_of(text)} == {"search.budget", "search", "distill.teacher_logits"}


@given(st.integers(1, 200), st.integers(10**4, 10**10), st.integers(1, 6))
def test_the_field_is_cut_down_to_one(candidates: int, tokens: int, rungs: int) -> None:
    found = halving(candidates, tokens, rungs)
    if candidates == 1:
        assert not found
        return
    assert len(found) == rungs and found[0].enter == candidates and found[-1].leave == 1
    assert found[-1].tokens == tokens
    for before, after in itertools.pairwise(found):
        assert after.enter == before.leave <= before.enter
        assert after.tokens == pytest.approx(before.tokens * GROWTH, rel=0.01, abs=1)


def test_one_rung_is_a_plain_race() -> None:
    (rung,) = halving(8, 1000, 1)
    assert (rung.enter, rung.leave, rung.tokens) == (8, 1, 1000)
    assert [branch_steps(steps) for steps in (1, 10, 96)] == [1, 1, 10]


@given(st.floats(1e-6, 1.0), st.floats(1.0, 1e3))
def test_rates_of_a_range_are_close_and_reach_both_ends(least: float, ratio: float) -> None:
    found = rates(Span(least, least * ratio))
    assert found[0] == least and (len(found) == 1 or found[-1] == least * ratio)
    for low, high in itertools.pairwise(found):
        assert 1 <= high / low <= RATE_FACTOR * 1.02
    assert len(found) <= math.ceil(math.log2(ratio)) + 2


@given(st.integers(1, 1000), st.integers(0, 10_000))
def test_batch_sizes_of_a_range_double(least: int, more: int) -> None:
    found = sizes(Span(least, least + more))
    assert found[0] == least and found[-1] <= least + more < 2 * found[-1]
    assert all(high == 2 * low for low, high in itertools.pairwise(found))
