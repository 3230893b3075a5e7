"""Selection: which indices the scores keep. Ties keep the lower index, so a selection is the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.compiler.axes.narrowing import Dependent
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.select import (
    Selection,
    leading,
    narrowing_of,
    select,
    select_heads,
    selection_json,
    top,
    wanted_heads,
    weakest_run,
)
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN
from minitron.compiler.student.targets import Targets
from tests.compiler.families import analysed

SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=12)


def scores(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def targets(layers: int = 2, named: tuple[int, ...] | None = None, **widths: int) -> Targets:
    return Targets(widths, layers, named, ())


class TestTop:
    def test_the_highest_stay_in_their_order(self) -> None:
        assert top(scores(0.1, 5, 2, 4), 2).tolist() == [1, 3]

    def test_of_equal_scores_the_lower_index_stays(self) -> None:
        assert top(scores(1, 3, 1, 3, 1), 3).tolist() == [0, 1, 3]
        assert top(scores(7, 7, 7, 7), 2).tolist() == [0, 1]

    def test_zero_and_minus_zero_are_equal(self) -> None:
        assert top(scores(-0.0, 0.0, -0.0), 2).tolist() == [0, 1]

    @given(SCORES, st.data())
    def test_it_is_a_choice_that_no_exchange_improves(self, values: list[int], data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(values)))
        kept = top(scores(*values), count).tolist()
        assert kept == sorted(set(kept)) and len(kept) == count
        gone = [i for i in range(len(values)) if i not in kept]
        assert all(values[k] > values[g] or (values[k] == values[g] and k < g) for k in kept for g in gone)


class TestRuns:
    def test_the_weakest_neighbours(self) -> None:
        assert weakest_run(scores(5, 1, 9, 2, 2, 9), 2) == [3, 4]
        assert weakest_run(scores(5, 1, 9, 2, 2, 9), 1) == [1]

    def test_of_equal_runs_the_first(self) -> None:
        assert weakest_run(scores(1, 1, 1, 1), 2) == [0, 1]

    def test_all_of_them(self) -> None:
        assert weakest_run(scores(3, 2, 1), 3) == [0, 1, 2]

    @given(SCORES, st.data())
    def test_no_run_of_that_length_is_weaker(self, values: list[int], data: st.DataObject) -> None:
        length = data.draw(st.integers(1, len(values)))
        run = weakest_run(scores(*values), length)
        assert run == list(range(run[0], run[0] + length))
        sums = [sum(values[i : i + length]) for i in range(len(values) - length + 1)]
        assert run[0] == sums.index(min(sums))


class TestHeads:
    def test_the_order_of_the_reference(self) -> None:
        """Two groups of four, two query heads to stay in each: 0 and 3 of the first, 4 and 5 of the second."""
        groups, lists = select_heads(scores(2.2, 0.1, 1.1, 2.1, 3, 2, 0, 1).reshape(2, 4), 2, 2)
        assert [int(g) * 4 + int(r) for g, kept in zip(groups, lists, strict=True) for r in kept] == [0, 3, 4, 5]

    def test_the_best_of_a_group_are_not_the_best_of_all(self) -> None:
        _, lists = select_heads(scores(9, 8, 7, 6, 1, 2, 3, 4).reshape(2, 4), 2, 2)
        assert [kept.tolist() for kept in lists] == [[0, 1], [2, 3]]

    def test_a_group_scores_by_the_root_of_the_squares_of_its_heads(self) -> None:
        """3 and 3 (4.24) stand above 4 and 1 (4.12), and below 0 and 4.5."""
        groups, _ = select_heads(scores(4, 1, 3, 3, 0, 4.5).reshape(3, 2), 2, 2)
        assert groups.tolist() == [1, 2]

    def test_lists_follow_the_kept_groups(self) -> None:
        groups, lists = select_heads(scores(9, 1, 0, 0, 1, 9).reshape(3, 2), 2, 1)
        assert groups.tolist() == [0, 2] and [kept.tolist() for kept in lists] == [[0], [1]]

    def test_of_equal_groups_the_lower_stays(self) -> None:
        groups, _ = select_heads(scores(1, 2, 2, 1, 1, 2).reshape(3, 2), 2, 2)
        assert groups.tolist() == [0, 1]

    def test_layers_that_read_the_same_keys_keep_the_same_groups(self) -> None:
        """Alone the first would keep group 0 and the second group 1; each ranks the heads within them by itself."""
        first, second = scores(4, 1, 0, 3).reshape(2, 2), scores(1, 2, 9, 0).reshape(2, 2)
        kept = [select_heads(one, 1, 1, [first, second]) for one in (first, second)]
        assert [groups.tolist() for groups, _ in kept] == [[1], [1]]
        assert [lists[0].tolist() for _, lists in kept] == [[1], [0]]

    @pytest.mark.parametrize(
        ("wanted", "left"), [({HEADS: 2}, (2, 1)), ({GROUPS: 1}, (1, 2)), ({HEADS: 1, GROUPS: 1}, (1, 1)), ({}, (2, 2))]
    )
    def test_how_many_are_left_of_one_attention(self, wanted: dict[str, int], left: tuple[int, int]) -> None:
        assert wanted_heads(targets(**wanted), analysed("llama").roles.heads[0]) == left


class TestSelect:
    """Of a tiny llama: two layers, 32 channels, feed-forward of 40, two groups of two query heads."""

    table = ScoreTable(
        hidden=np.arange(32, dtype=np.float32),
        heads={0: scores(1, 2, 4, 3).reshape(2, 2), 1: scores(5, 0, 0, 1).reshape(2, 2)},
        widths={"intermediate_size": {0: np.arange(40, dtype=np.float32), 1: np.arange(40, 0, -1, dtype=np.float32)}},
        layers=scores(0.5, 0.1),
    )

    def select(self, wanted: Targets, *, contiguous: bool = False) -> Selection:
        return select(wanted, analysed("llama").roles, self.table, 2, contiguous=contiguous)

    def test_one_list_for_the_network_and_one_for_every_layer(self) -> None:
        selection = self.select(targets(**{HIDDEN: 3, "intermediate_size": 2}))
        assert selection.hidden is not None and selection.hidden.tolist() == [29, 30, 31]
        assert {i: kept.tolist() for i, kept in selection.widths["intermediate_size"].items()} == {
            0: [38, 39],
            1: [0, 1],
        }
        assert selection.layers == (0, 1) and not selection.groups and not selection.heads

    def test_heads_are_chosen_within_every_group_of_every_layer(self) -> None:
        selection = self.select(targets(**{HEADS: 2, GROUPS: 2}))
        assert {i: [kept.tolist() for kept in lists] for i, lists in selection.heads.items()} == {
            0: [[1], [0]],
            1: [[0], [1]],
        }

    def test_a_dropped_group_takes_its_heads_along(self) -> None:
        selection = self.select(targets(**{HEADS: 2, GROUPS: 1}))
        assert {i: kept.tolist() for i, kept in selection.groups.items()} == {0: [1], 1: [0]}
        assert all(kept.tolist() == [0, 1] for lists in selection.heads.values() for kept in lists)

    def test_nothing_is_said_of_what_stays_whole(self) -> None:
        assert self.select(targets()) == Selection((0, 1), None, {}, {}, {})

    def test_dropped_layers_have_no_lists(self) -> None:
        selection = self.select(targets(1, intermediate_size=2))
        assert selection.layers == (0,) and list(selection.widths["intermediate_size"]) == [0]

    def test_layers_that_are_named_need_no_scores(self) -> None:
        assert self.select(targets(1, named=(1,))).layers == (1,)

    def test_the_highest_scored_layers_or_all_but_one_run(self) -> None:
        table = ScoreTable(layers=scores(9, 1, 8, 2, 2, 7))
        roles = analysed("llama").roles
        assert select(targets(4), roles, table, 6, contiguous=False).layers == (0, 2, 3, 5)
        assert select(targets(4), roles, table, 6, contiguous=True).layers == (0, 1, 2, 5)

    def test_a_stand_in_has_the_sizes_of_a_selection(self) -> None:
        wanted = targets(1, **{HIDDEN: 3, "intermediate_size": 2, HEADS: 2, GROUPS: 1})
        chosen, stand_in = self.select(wanted), leading(wanted, analysed("llama").roles)
        as_sizes = [
            {
                axis: [len(kept) for kept in lists]
                for axis, lists in selection_json(one, analysed("llama").roles).items()
            }
            for one in (chosen, stand_in)
        ]
        assert as_sizes[0] == as_sizes[1]


class TestIndexLists:
    def test_every_leaf_gets_its_list(self) -> None:
        model = analysed("llama")
        selection = TestSelect().select(targets(**{HIDDEN: 3, "intermediate_size": 2, HEADS: 2, GROUPS: 2}))
        narrowing = narrowing_of(selection, model.roles, model.table)
        dims = model.table.parameters
        rows, columns = dims["model.layers.1.mlp.down_proj.weight"]
        assert narrowing.positions(rows).tolist() == [29, 30, 31] and narrowing.positions(columns).tolist() == [0, 1]
        queries, _ = dims["model.layers.0.self_attn.q_proj.weight"]
        assert narrowing.positions(queries).tolist() == [*range(8, 16), *range(16, 24)]
        values, _ = dims["model.layers.0.self_attn.v_proj.weight"]
        assert narrowing.count(values) == 16

    def test_lists_of_groups_that_are_gone_are_never_read(self) -> None:
        model = analysed("llama")
        selection = TestSelect().select(targets(**{HEADS: 1, GROUPS: 1}))
        narrowing = narrowing_of(selection, model.roles, model.table)
        site = model.roles.heads[0]
        assert site.repeat is not None and isinstance(narrowing.dependent[site.repeat], Dependent)
        queries, _ = model.table.parameters["model.layers.0.self_attn.q_proj.weight"]
        assert narrowing.positions(queries).tolist() == list(range(16, 24))

    def test_what_is_kept_whole_is_not_narrowed(self) -> None:
        model = analysed("llama")
        selection = TestSelect().select(targets(**{HEADS: 2, GROUPS: 2}))
        narrowing = narrowing_of(selection, model.roles, model.table)
        assert model.roles.heads[0].group not in narrowing.kept

    @pytest.mark.parametrize(("groups", "kept"), [(1, [2, 3]), (4, [2, 3])])
    def test_without_groups_or_without_repeats_there_is_one_list(self, groups: int, kept: list[int]) -> None:
        model = analysed("llama", num_key_value_heads=groups)
        shape = (1, 4) if groups == 1 else (4, 1)
        table = ScoreTable(heads={i: scores(0, 1, 2, 3).reshape(shape) for i in (0, 1)})
        wanted = targets(**({HEADS: 2} if groups == 1 else {HEADS: 2, GROUPS: 2}))
        narrowing = narrowing_of(select(wanted, model.roles, table, 2, contiguous=False), model.roles, model.table)
        queries, _ = model.table.parameters["model.layers.0.self_attn.q_proj.weight"]
        assert narrowing.positions(queries).tolist() == [head * 8 + channel for head in kept for channel in range(8)]
        assert not narrowing.dependent


def test_the_plan_lists_heads_by_their_numbers_in_the_teacher() -> None:
    selection = TestSelect().select(targets(**{HEADS: 2, GROUPS: 2, HIDDEN: 3}))
    assert selection_json(selection, analysed("llama").roles) == {
        "num_hidden_layers": [[0, 1]],
        "hidden_size": [[29, 30, 31]],
        "num_key_value_heads": [[0, 1], [0, 1]],
        "num_attention_heads": [[1, 2], [0, 3]],
    }
