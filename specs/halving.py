"""Successive halving (arXiv 1502.07943): the field is cut down rung by rung, and those that stay are trained longer."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROWTH = 2.0  # a rung is twice as long as the one before it
WARMUP_SHARE = 0.2  # of the first rung's steps, at most: what follows must tell learning rates apart
BRANCH_SHARE = 0.1  # of a rung, over which the rate of the branch that judges it decays (arXiv 2405.18392)
LEARNERS_SHARE = 0.7  # of a device's free memory that candidates take; activations and logits have the rest


@dataclass(frozen=True)
class Rung:
    """One round: `enter` candidates are trained up to `tokens` tokens, counted from their beginning, and the best `leave`
    stay."""

    number: int
    tokens: int
    enter: int
    leave: int


def halving(candidates: int, tokens: int, rungs: int) -> tuple[Rung, ...]:
    """Returns the rungs that leave one of `candidates` after it was trained on `tokens` tokens; none for one candidate.

    Every rung keeps the same share of its field, candidates^(-1/rungs). The first one costs most: where all rungs cost the
    same, as in the paper, it is too short to tell which candidates come to something (docs/search.md has the figures).
    """
    if candidates == 1:
        return ()
    found: list[Rung] = []
    for number in range(1, rungs + 1):
        enter = found[-1].leave if found else candidates
        leave = 1 if number == rungs else math.ceil(candidates ** (1 - number / rungs) - 1e-9)
        found.append(Rung(number, max(1, round(tokens * GROWTH ** (number - rungs))), enter, leave))
    return tuple(found)


def fitted_warmup(warmup_steps: int, first_steps: int) -> int:
    """Returns the warm-up of a candidate whose first rung is `first_steps` long."""
    return min(warmup_steps, int(WARMUP_SHARE * first_steps))


def branch_steps(steps: int) -> int:
    """Returns the last steps of a rung that its branch takes with a decaying rate."""
    return max(1, round(BRANCH_SHARE * steps))
