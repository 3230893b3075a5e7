"""Settings of the training of which a search finds the best: a value, a list of values, or a range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

from minitron.specs.blocks.base import choice_schema, read_list, read_span, read_whole, whole_choices, wrong
from minitron.specs.units import LARGEST, Span

# Neighbouring rates of a range differ by this factor at most: in a trial (docs/method.md) twice the best rate, or half of it,
# left the divergence about a tenth higher, so that a closer grid would win a few per cent at the price of more candidates.
RATE_FACTOR = 2.0
SIZE_FACTOR = 2


def _read_rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise wrong(
            f"`{getattr(value, 'text', value)}` is not a learning rate", "write a number greater than 0, such as 3e-4"
        )
    return float(value)


def _read_size(value: Any) -> int:
    value = read_whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise wrong(
            f"`{getattr(value, 'text', value)}` is not a number of sequences", "write a whole number of at least 1"
        )
    return value


def _read_rates(value: Any, one: ValidatorFunctionWrapHandler) -> Any:
    return _read(value, one, _read_rate, "learning rate", "{min: 1e-4, max: 1e-3}")


def _read_sizes(value: Any, one: ValidatorFunctionWrapHandler) -> Any:
    return _read(value, one, _read_size, "batch size", "{min: 128, max: 768}")


def _read(value: Any, one: ValidatorFunctionWrapHandler, read: Callable[[Any], Any], what: str, example: str) -> Any:
    """Reads lists and ranges; a single value is left to pydantic, which says what is wrong with it."""
    if isinstance(value, Span):
        return value
    if isinstance(value, Mapping):
        return read_span(value, read, example)
    if isinstance(value, list | tuple):
        return read_list(value, read, what)
    return one(read_whole(value) if read is _read_size else value)


def _write(value: Any) -> Any:
    if isinstance(value, Span):
        return {"min": value.least, "max": value.most}
    return list(value) if isinstance(value, tuple) else value


if TYPE_CHECKING:
    Rates: TypeAlias = float | tuple[float, ...] | Span[float]
    Sizes: TypeAlias = int | tuple[int, ...] | Span[int]
else:  # pydantic checks single values; lists and ranges do not reach its own check
    Rates = Annotated[
        float,
        Field(gt=0),
        WrapValidator(_read_rates),
        PlainSerializer(_write),
        choice_schema([{"type": "number", "exclusiveMinimum": 0}]),
    ]
    """A learning rate; under `search` a list or a range of them."""

    Sizes = Annotated[
        int,
        Field(ge=1, le=LARGEST),
        WrapValidator(_read_sizes),
        PlainSerializer(_write),
        choice_schema(whole_choices(1, LARGEST)),
    ]
    """A batch size; under `search` a list or a range of them."""


def rates(value: float | tuple[float, ...] | Span[float]) -> tuple[float, ...]:
    """Returns the learning rates to try, ascending: those of a range differ by the same factor, at most RATE_FACTOR."""
    if not isinstance(value, Span):
        return tuple(sorted(value)) if isinstance(value, tuple) else (value,)
    steps = math.ceil(math.log(value.most / value.least, RATE_FACTOR) - 1e-9)
    if steps < 1:
        return (value.least,)
    inner = [value.least * (value.most / value.least) ** (step / steps) for step in range(1, steps)]
    # Three digits: a rate that a person can read and write again.
    return (value.least, *(float(f"{one:.3g}") for one in inner), value.most)


def sizes(value: int | tuple[int, ...] | Span[int]) -> tuple[int, ...]:
    """Returns the batch sizes to try, ascending: those of a range double from the smallest."""
    if not isinstance(value, Span):
        return tuple(sorted(value)) if isinstance(value, tuple) else (value,)
    found = [value.least]
    while found[-1] * SIZE_FACTOR <= value.most:
        found.append(found[-1] * SIZE_FACTOR)
    return tuple(found)
