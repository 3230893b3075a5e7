"""The order in which choices of layers are tried: the highest-scored first, then those that give up least.

Not every choice can be a student: a configuration may not be able to say it, or transformers' caches may want a layer with
attention. So choices follow one another until one can.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from minitron.compiler.importance.select import top

MOST_EXCHANGED = 2
"""Layers by which a choice differs at most from the highest-scored one, where neighbours need not go together."""


def choices(scores: npt.NDArray[np.float32], keep: int, *, contiguous: bool) -> Iterator[tuple[int, ...]]:
    """Yields choices of `keep` layers, best first: all that drop one run of neighbours, or the highest-scored layers and
    those that exchange one or two of them for dropped ones."""
    count, exact = len(scores), scores.astype(np.float64)
    if contiguous:
        sums = np.convolve(exact, np.ones(count - keep), mode="valid")
        for start in np.argsort(sums, kind="stable").tolist():
            yield tuple(i for i in range(count) if not start <= i < start + count - keep)
        return
    best = [int(i) for i in top(scores, keep)]
    others = [i for i in range(count) if i not in best]
    yield tuple(best)
    for exchanged in range(1, min(MOST_EXCHANGED, keep, len(others)) + 1):
        given_up = [
            (float(exact[list(out)].sum() - exact[list(come)].sum()), out, come)
            for out in itertools.combinations(best, exchanged)
            for come in itertools.combinations(others, exchanged)
        ]
        for _, out, come in sorted(given_up):
            yield tuple(sorted({*best, *come} - {*out}))
