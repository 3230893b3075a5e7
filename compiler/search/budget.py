"""The budget: which shapes are within each of its limits, and which limit excludes the nearest shape where none is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minitron.compiler.search.pricing import Prices
from minitron.compiler.search.workload import device_of, served
from minitron.specs.blocks.search import Budget
from minitron.specs.units import BYTES_UNITS, COUNT_UNITS, FLOPS_UNITS, format_quantity

Flags = npt.NDArray[np.bool_]
Excess = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """One limit: its path below `search.budget`, what it says in words, and how far each shape is beyond it, as a share of
    it; at most 0 within it. `values` are the figures that it limits."""

    path: str
    words: str
    excess: Excess
    values: npt.NDArray[np.float64]
    unit: Mapping[str, int] | None

    @property
    def within(self) -> Flags:
        return self.excess <= 0

    def written(self, index: int) -> str:
        """The figure of one shape, in the limit's unit."""
        value = self.values[index]
        return f"{value:.3g} ms" if self.unit is None else shown(int(value), self.unit)


def limits(budget: Budget, prices: Prices) -> Iterator[Limit]:
    """Yields the limits of a budget, in the order of the spec reference."""
    if budget.parameters is not None:
        wanted = budget.parameters
        distance = np.abs(prices.parameters - wanted) / wanted - budget.tolerance
        words = f"{format_quantity(wanted, COUNT_UNITS)} parameters, {100 * budget.tolerance:.3g}% more or less"
        yield Limit("parameters", words, distance, prices.parameters.astype(np.float64), COUNT_UNITS)
    plain = (
        ("active_parameters", "active parameters", budget.active_parameters, prices.active_parameters, COUNT_UNITS),
        ("memory", "weights", budget.memory, prices.weight_bytes, BYTES_UNITS),
        ("flops_per_token", "FLOPs a token", budget.flops_per_token, prices.flops_per_token, FLOPS_UNITS),
        ("kv_cache", "key-value cache a token", budget.kv_cache, prices.kv_cache_bytes_per_token, BYTES_UNITS),
    )
    for path, what, most, values, unit in plain:
        if most is not None:
            words = f"at most {format_quantity(most, unit)} of {what}"
            yield Limit(path, words, values / most - 1.0, values.astype(np.float64), unit)
    if (workload := budget.workload) is not None:
        work, device = served(workload, prices), device_of(workload)
        words = f"at most {shown(device.memory_bytes, BYTES_UNITS)} for the workload on {device.name}"
        yield Limit("workload", words, work.memory / device.memory_bytes - 1.0, work.memory, BYTES_UNITS)
        if (most_ms := workload.milliseconds_per_token) is not None:
            words = f"at most {most_ms:g} ms a token of the workload on {device.name} (an estimate)"
            path = "workload.milliseconds_per_token"
            yield Limit(path, words, work.milliseconds / most_ms - 1.0, work.milliseconds, None)


def nearest(found: Sequence[Limit]) -> int:
    """Returns the shape whose largest excess is smallest."""
    return int(np.argmin(np.max([limit.excess for limit in found], axis=0)))


def shown(value: int, unit: Mapping[str, int]) -> str:
    """Formats a figure with three digits and a unit."""
    fitting = [(name, size) for name, size in unit.items() if size <= value and not name.endswith("iB")]
    name, size = fitting[-1] if fitting else ("", 1)
    return f"{value / size:.3g}{name}"
