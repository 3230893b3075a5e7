"""The scales of charts: the coordinates of values, and round numbers for the ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minitron.cli import figures

_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A linear map from values `low..high` to coordinates `start..end` (SVG's y grows downwards: start > end)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Returns round numbers within the range, roughly `about` of them; for a range of a single point that value."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        magnitude = 10.0 ** math.floor(math.log10(span / about))
        step = next(one * magnitude for one in _STEPS if one * magnitude >= span / about * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def scale(values: list[float], start: float, end: float, *, zero: bool = False) -> Scale:
    """Returns the scale that holds all finite `values`, with some margin; it starts at zero where `zero` is set."""
    low, high = min(values), max(values)
    if zero:
        return Scale(min(0.0, low), max(0.0, high) * 1.05 or 1.0, start, end)
    air = (high - low) * 0.06
    return Scale(low - air, high + air, start, end)


def tick_label(value: float) -> str:
    """Formats a tick's number in few characters: 0.0005, 5e-05, 2.2k, 160k."""
    if abs(value) < 1000:
        return f"{value:.3g}"
    number = figures.short(value)
    digits = number.rstrip("kMGTPE")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + number[len(digits) :]
