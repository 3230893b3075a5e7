"""The arithmetic of benchmarks/search.py: what a way of choosing would have chosen, from curves that are known."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest

from tests.benchmarks.load import load_benchmark

search = load_benchmark("search")
POINTS = [100, 200, 400]


def curves(count: int) -> dict[int, dict[int, tuple[float, float]]]:
    """Candidates whose number is their rank, on the branch; on the trunk the order is the other way round."""
    return {n: {point: (n / point, (count - n) / point) for point in POINTS} for n in range(1, count + 1)}


def test_halving_finds_the_best_of_curves_that_do_not_cross() -> None:
    chosen, cost = search.halved(curves(8), 200, 2, 0, POINTS)
    # Rungs of 71 and 200 tokens: eight candidates for the first, three go on; and a branch of a tenth of each.
    assert chosen == 1 and cost == pytest.approx((8 * 110 + 3 * (100 + 20)) / (8 * 400))
    assert search.halved(curves(8), 200, 2, 1, POINTS)[0] == 8


def test_random_search_is_the_mean_over_all_draws() -> None:
    finals = {1: 0.5, 2: 0.7, 3: 0.4, 4: 0.9, 5: 0.8}
    for trained in range(1, 6):
        draws = [min(draw) for draw in itertools.combinations(finals.values(), trained)]
        assert search.random_search(finals, trained) == pytest.approx(statistics.mean(draws))


def test_the_rank_correlation_knows_order_alone() -> None:
    values = np.array([0.3, 0.1, 0.9, 0.5])
    assert search.spearman(values, np.exp(values)) == pytest.approx(1.0)
    assert search.spearman(values, -values) == pytest.approx(-1.0)
