"""The benchmark's random choice: of the sizes that the plan has, and of nothing else."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.load import load_benchmark


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return load_benchmark("quality")


def plan(**axes: tuple[int, int]) -> dict[str, Any]:
    """A plan's JSON as far as the benchmark reads it: teacher and student width of each axis, all of them chosen."""
    return {
        "axes": [{"axis": name, "teacher": teacher, "student": student} for name, (teacher, student) in axes.items()],
        "selection": {name: [] for name in axes},
    }


PLAN = plan(
    hidden_size=(16, 8),
    intermediate_size=(40, 24),
    num_attention_heads=(12, 4),
    num_key_value_heads=(4, 2),
    num_hidden_layers=(6, 3),
)


def test_it_draws_as_many_of_each_as_the_plan_keeps(quality: ModuleType) -> None:
    chosen = quality.random_selection(PLAN, seed=0)
    assert len(chosen.layers) == 3 and set(chosen.layers) <= set(range(6))
    assert len(chosen.hidden) == 8 and set(chosen.hidden) <= set(range(16))
    assert set(chosen.widths) == {"intermediate_size"}
    for layer in chosen.layers:
        assert len(set(chosen.widths["intermediate_size"][layer])) == 24
        assert len(set(chosen.groups[layer])) == 2
        # 12 query heads in 4 groups: three repeats each, of which 4 / 2 stay.
        assert [len(set(heads)) for heads in chosen.heads[layer]] == [2, 2]
        assert all(set(heads) <= set(range(3)) for heads in chosen.heads[layer])


def test_lists_are_ascending_as_the_compiler_wants_them(quality: ModuleType) -> None:
    chosen = quality.random_selection(PLAN, seed=1)
    layer = chosen.layers[0]
    for indices in (chosen.layers, chosen.hidden, chosen.widths["intermediate_size"][layer], *chosen.heads[layer]):
        assert list(indices) == sorted(indices)


def test_an_axis_that_stays_whole_is_not_drawn(quality: ModuleType) -> None:
    only_layers = plan(num_hidden_layers=(4, 2)) | {"selection": {"num_hidden_layers": [[0, 1]]}}
    chosen = quality.random_selection(only_layers, seed=0)
    assert chosen.hidden is None and not chosen.widths and not chosen.groups and not chosen.heads


def test_the_seed_decides(quality: ModuleType) -> None:
    def hidden(seed: int) -> list[int]:
        return list(quality.random_selection(PLAN, seed).hidden)

    assert hidden(3) == hidden(3)
    assert len({tuple(hidden(seed)) for seed in range(8)}) > 1
