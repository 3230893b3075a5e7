"""Forecasts what more tokens will bring: a scaling law, fitted to how one student was judged after each rung.

    L(D) = E + A / D^b      L the divergence on held-out text after D tokens, E what no number of tokens removes

A few figures cannot tell E from b: every pair that fits about as well as the best is kept, and their predictions are the
interval. The form is that of arXiv 2203.15556, section 3.3, for one size of model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NOISE = 0.02  # relative, by which a figure may be off that was judged on a few thousand tokens
EXPONENTS = np.geomspace(0.05, 2.0, 400)
FLOORS = np.linspace(0.0, 0.99, 100)  # of the lowest figure


@dataclass(frozen=True)
class Forecast:
    """The divergence after `tokens`, and the range of all fits within NOISE of the best; `error` is the root mean square of the
    best fit's relative misses."""

    tokens: int
    kl: float
    low: float
    high: float
    floor: float
    factor: float
    exponent: float
    error: float
    points: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(points: Sequence[tuple[int, float]], tokens: int) -> Forecast | None:
    """Fits (tokens, divergence) and predicts the divergence after `tokens`; None for less than two figures."""
    if len(points) < 2 or min(value for _, value in points) <= 0:
        return None
    d, losses = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    # In units of the last rung, so that A is the part of its divergence that more tokens remove.
    reduced = (d / d[-1])[None, :] ** -EXPONENTS[:, None]
    floors = FLOORS * losses.min()
    x = reduced[:, None, :] / losses  # [exponents, 1, points]
    y = 1.0 - floors[None, :, None] / losses  # [1, floors, points]
    factors = np.maximum((x * y).sum(-1) / np.square(x).sum(-1), 0.0)
    errors = np.sqrt(np.square(factors[..., None] * x - y).mean(-1))
    predicted = floors[None, :] + factors * (tokens / d[-1]) ** -EXPONENTS[:, None]
    i, j = np.unravel_index(int(np.argmin(errors)), errors.shape)
    fitting = predicted[errors <= errors[i, j] + NOISE]
    return Forecast(
        tokens=tokens,
        kl=float(predicted[i, j]),
        low=float(fitting.min()),
        high=float(fitting.max()),
        floor=float(floors[j]),
        factor=float(factors[i, j] * d[-1] ** EXPONENTS[i]),
        exponent=float(EXPONENTS[i]),
        error=float(errors[i, j]),
        points=len(points),
    )
