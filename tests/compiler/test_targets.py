"""Targets: what a spec asks for against what the teacher has. Every width that cannot be is an error at its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.compiler.student.status import status_of
from minitron.compiler.student.targets import Targets, resolve_targets
from minitron.specs.blocks.student import Student
from minitron.specs.errors import Problem
from tests.compiler.families import analysed


def resolved(asked: dict[str, Any], model: AnalysedTeacher | None = None) -> tuple[Targets | None, list[Problem]]:
    """Of a tiny llama unless another model is given: hidden 32, feed-forward 40, two groups of two heads, two layers."""
    model = model or analysed("llama")
    return resolve_targets(Student.model_validate(asked), model)


def targets(asked: dict[str, Any], model: AnalysedTeacher | None = None) -> Targets:
    found, errors = resolved(asked, model)
    assert not errors and found is not None, errors
    return found


def refusal(asked: dict[str, Any], model: AnalysedTeacher | None = None) -> str:
    """The one error, without its place."""
    found, errors = resolved(asked, model)
    assert found is None
    (error,) = errors
    return f"{error.path}: {error.message}; {error.hint}"


def heads(groups: int, repeats: int) -> AnalysedTeacher:
    """A llama whose attention is said to have other counts: the rules of heads are about numbers alone."""
    model = analysed("llama") if repeats > 1 else analysed("llama", num_key_value_heads=4)
    sites = {i: replace(site, groups=groups, repeats=repeats) for i, site in model.roles.heads.items()}
    return replace(model, roles=replace(model.roles, heads=sites))


def test_every_candidate_of_a_search_is_held_against_the_teacher() -> None:
    found, errors = resolved({HIDDEN: [16, 64], "intermediate_size": [8, 40], "num_hidden_layers": [1, 9]})
    assert found is None
    assert {(error.path, error.hint) for error in errors} == {
        (f"student.{HIDDEN}.1", "write at most 32"),
        ("student.num_hidden_layers.1", "write at most 2"),
    }


class TestWidths:
    def test_a_share_of_which_nothing_is_left(self) -> None:
        assert refusal({HIDDEN: "0.1%"}).endswith(
            "0 is not between 1 and the teacher's 32; write a larger share, or a number"
        )

    def test_numbers_are_taken_as_they_are(self) -> None:
        found = targets({HIDDEN: 20, "intermediate_size": 17})
        assert dict(found.widths) == {HIDDEN: 20, "intermediate_size": 17}
        assert found.layers == 2 and found.named_layers is None

    def test_what_is_left_out_or_whole_is_no_target(self) -> None:
        assert dict(targets({HIDDEN: 32, "intermediate_size": 39}).widths) == {"intermediate_size": 39}
        assert dict(targets({}).widths) == {}

    def test_even_a_refused_axis_may_be_asked_for_as_it_is(self) -> None:
        assert dict(targets({"head_dim": 8}).widths) == {}

    @pytest.mark.parametrize(
        ("share", "options", "width"),
        [
            ("75%", {}, 24),  # 24 of 32, a multiple of 8
            ("80%", {}, 24),  # 25.6, rounded down to a multiple of 8
            ("80%", {"multiple_of": 1}, 25),
            ("80%", {"multiple_of": 5}, 25),
            ("100%", {}, 32),
        ],
    )
    def test_a_share_of_a_width_is_rounded_down_to_a_multiple(
        self, share: str, options: dict[str, int], width: int
    ) -> None:
        assert targets({HIDDEN: share, **options}).widths.get(HIDDEN, 32) == width

    def test_from_1024_up_a_share_is_a_multiple_of_64(self) -> None:
        model = analysed("llama", intermediate_size=1024)
        assert targets({"intermediate_size": "80%"}, model).widths["intermediate_size"] == 768

    def test_every_axis_of_the_teacher_has_its_line(self) -> None:
        found = targets({HIDDEN: 20, LAYERS: 1, HEADS: 2})
        lines = {line.axis: (line.teacher, line.student, line.status) for line in found.statuses}
        assert lines == {
            HIDDEN: (32, 20, "exact"), "intermediate_size": (40, 40, "exact"), HEADS: (4, 2, "exact"),
            GROUPS: (2, 2, "exact"), "head_dim": (8, 8, "refused"), LAYERS: (2, 1, "exact"),
        }  # fmt: skip


class TestRefusals:
    def test_more_than_the_teacher_has(self) -> None:
        assert (
            refusal({HIDDEN: 33}) == "student.hidden_size: 33 is not between 1 and the teacher's 32; write at most 32"
        )

    def test_a_share_that_leaves_nothing(self) -> None:
        assert "student.hidden_size: 0 is not between 1 and the teacher's 32" in refusal({HIDDEN: "10%"})

    @pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size", "mamba_num_heads"])
    def test_an_axis_that_the_teacher_has_not(self, key: str) -> None:
        assert refusal({key: 2}) == f"student.{key}: the teacher (llama) has no {key}; leave it out"

    def test_an_axis_that_is_pinned_says_why(self) -> None:
        assert refusal({"head_dim": 4}) == (
            "student.head_dim: cannot be narrowed: fixed by the rotary embeddings (model.rotary_emb.inv_freq); leave it "
            "out, or write 8"
        )

    def test_fewer_experts_than_a_router_picks(self) -> None:
        assert dict(targets({"num_experts": 2}, analysed("mixtral")).widths) == {"num_experts": 2}
        message = "student.num_experts: 1 experts are fewer than the router needs: it sends every token to 2"
        assert refusal({"num_experts": 1}, analysed("mixtral")) == f"{message}; write at least 2"

    def test_one_group_is_no_axis(self) -> None:
        model = analysed("llama", num_key_value_heads=1)
        assert dict(targets({GROUPS: 1, HEADS: 2}, model).widths) == {HEADS: 2}

    def test_two_widths_of_one_kind(self) -> None:
        model = analysed("llama")
        reason = "layer 0 has more than one axis of this kind"
        torn = replace(model, roles=replace(model.roles, refusals={"intermediate_size": reason}))
        assert f"cannot be narrowed: {reason}" in refusal({"intermediate_size": 24}, torn)

    def test_widths_that_differ_from_layer_to_layer(self) -> None:
        model = analysed("llama")
        other = analysed("llama", intermediate_size=24).roles.widths["intermediate_size"][1]
        mixed = {"intermediate_size": {0: model.roles.widths["intermediate_size"][0], 1: other}}
        uneven = replace(model, roles=replace(model.roles, widths=mixed))
        assert uneven.widths["intermediate_size"] == 40
        assert "its width differs from layer to layer" in refusal({"intermediate_size": 16}, uneven)

    @pytest.mark.parametrize("key", [HEADS, GROUPS])
    def test_heads_that_differ_from_layer_to_layer(self, key: str) -> None:
        model = analysed("llama")
        sites = {0: model.roles.heads[0], 1: replace(model.roles.heads[1], repeats=3)}
        uneven = replace(model, roles=replace(model.roles, heads=sites))
        assert "its number differs from layer to layer" in refusal({key: 1}, uneven)

    def test_all_errors_come_at_once(self) -> None:
        _, errors = resolved({HIDDEN: 99, "intermediate_size": "1%", "head_dim": 4, HEADS: 3, "layers": {"drop": [7]}})
        assert [error.path for error in errors] == [
            "student.hidden_size", "student.intermediate_size", "student.head_dim", "student.num_attention_heads",
            "student.layers.drop",
        ]  # fmt: skip


class TestHeads:
    def test_groups_alone_take_their_query_heads_along(self) -> None:
        assert dict(targets({GROUPS: 1}).widths) == {GROUPS: 1, HEADS: 2}

    def test_query_heads_alone_leave_the_groups(self) -> None:
        assert dict(targets({HEADS: 2}).widths) == {HEADS: 2}

    def test_one_query_head_a_group_narrows_both(self) -> None:
        model = analysed("llama", num_key_value_heads=4)
        assert (
            dict(targets({HEADS: 3}, model).widths) == dict(targets({GROUPS: 3}, model).widths) == {HEADS: 3, GROUPS: 3}
        )

    def test_both_may_be_named(self) -> None:
        assert dict(targets({HEADS: 1, GROUPS: 1}).widths) == {HEADS: 1, GROUPS: 1}

    def test_heads_that_do_not_divide_into_the_groups(self) -> None:
        assert refusal({HEADS: 3}) == (
            "student.num_attention_heads: 3 query heads do not divide into 2 key-value groups; "
            "write 2 or 4, or change num_key_value_heads"
        )

    def test_the_nearest_that_would_do_are_named(self) -> None:
        assert "write 12 or 16," in refusal({HEADS: 13}, heads(4, 6))
        assert "write 4 or 8," in refusal({HEADS: 1}, heads(4, 6))

    def test_more_heads_than_the_groups_have(self) -> None:
        assert refusal({HEADS: 4, GROUPS: 1}) == (
            "student.num_attention_heads: 1 key-value groups of this teacher have 2 query heads, 2 each, not 4; "
            "write 1 or 2, or change num_key_value_heads"
        )

    def test_fewer_heads_than_groups(self) -> None:
        assert "do not divide into 4 key-value groups" in refusal({HEADS: 2}, heads(4, 6))

    @pytest.mark.parametrize(
        ("asked", "left"),
        [
            ({HEADS: "80%"}, (4, 16)),  # 19 of 24, down to 4 x 4
            ({HEADS: "50%"}, (4, 12)),
            ({GROUPS: "80%"}, (3, 18)),  # 3 groups of 6
            ({HEADS: "50%", GROUPS: "50%"}, (2, 12)),
            ({HEADS: "45%", GROUPS: "75%"}, (3, 9)),  # 10 of 24, down to 3 x 3
            ({HEADS: 6, GROUPS: "99%"}, (3, 6)),
        ],
    )
    def test_a_share_is_rounded_down_to_what_divides(self, asked: dict[str, Any], left: tuple[int, int]) -> None:
        found, errors = resolved(asked, heads(4, 6))
        assert found is not None and not errors
        widths = {HEADS: 24, GROUPS: 4, **found.widths}
        assert (widths[GROUPS], widths[HEADS]) == left

    def test_a_share_that_nothing_below_makes_fit(self) -> None:
        """16 heads stand in 4 groups alone: 3 do not divide them, and 2 have 12 at most."""
        assert "16 query heads do not divide into 3 key-value groups" in refusal(
            {HEADS: 16, GROUPS: "80%"}, heads(4, 6)
        )

    @given(groups=st.integers(1, 4), asked=st.integers(1, 24))
    def test_whatever_is_accepted_divides(self, groups: int, asked: int) -> None:
        found, errors = resolved({HEADS: asked, GROUPS: groups}, heads(4, 6))
        fits = asked % groups == 0 and asked // groups <= 6
        assert (found is not None) == fits and bool(errors) != fits
        for error in errors:
            numbers = [int(word) for word in error.hint.split(",")[0].split() if word.isdigit()]
            assert numbers and all(resolved({HEADS: n, GROUPS: groups}, heads(4, 6))[0] for n in numbers)


class TestLayers:
    def test_a_number_of_layers(self) -> None:
        found = targets({LAYERS: 1})
        assert (found.layers, found.named_layers, dict(found.widths)) == (1, None, {})

    def test_a_share_of_the_layers_is_a_whole_number(self) -> None:
        assert targets({LAYERS: "75%"}).layers == 1

    @pytest.mark.parametrize("named", [{"drop": [0]}, {"keep": [1]}])
    def test_layers_that_are_named(self, named: dict[str, list[int]]) -> None:
        found = targets({"layers": named})
        assert (found.layers, found.named_layers) == (1, (1,))

    def test_kept_layers_stand_in_the_order_of_the_teacher(self) -> None:
        assert targets({"layers": {"keep": [1, 0]}}).named_layers == (0, 1)

    @pytest.mark.parametrize("key", ["drop", "keep"])
    def test_a_layer_that_is_not_there(self, key: str) -> None:
        message = f"student.layers.{key}: layer 5 does not exist; the teacher has layers 0 to 1"
        assert refusal({"layers": {key: [0, 5]}}) == message

    def test_no_layer_left(self) -> None:
        assert refusal({"layers": {"drop": [0, 1]}}) == "student.layers.drop: no layer would be left; keep at least one"

    def test_more_layers_than_there_are(self) -> None:
        assert "3 is not between 1 and the teacher's 2" in refusal({LAYERS: 3})


def test_layers_are_always_exact() -> None:
    model = analysed("llama")
    assert status_of(LAYERS, model) == ("exact", "the same as zeroing the layer's residual update")


def test_an_axis_that_the_graph_does_not_show() -> None:
    model = analysed("llama")
    kind, reason = status_of("num_experts", model)
    assert (kind, reason) == ("refused", "the graph of llama shows no such axis")
