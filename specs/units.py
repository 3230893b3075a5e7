"""Reads numbers with units exactly: `380B` tokens, `24GiB` of memory, `80%` of the teacher.

All arithmetic uses `Decimal` and `Fraction`: `1.8B` is 1,800,000,000 and 70% of 10 is 7, without float rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Generic, TypeVar

COUNT_UNITS: Mapping[str, int] = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FLOPS_UNITS: Mapping[str, int] = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
BYTES_UNITS: Mapping[str, int] = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

# Counts travel through JSON, tensors and file headers: nothing in this field is larger than a signed 64-bit integer.
LARGEST = 2**63 - 1

# Exponents beyond this are refused before anything is computed: exact arithmetic would write 1e999999999 out.
_DIGITS = 30

NUMBER_PATTERN = r"[+-]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9]+)?"
_QUANTITY = re.compile(rf"({NUMBER_PATTERN})\s*([A-Za-z]*)")
_PERCENT = re.compile(rf"({NUMBER_PATTERN})\s*%")


def parse_quantity(text: str, units: Mapping[str, int]) -> int:
    """Parses a quantity: `8.0B` with `COUNT_UNITS` -> 8000000000. A number without a unit is taken unchanged.

    ValueError, whose text says what is wrong with `text`, for anything that is not a whole number.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"`{text}` is not a number")
    number, unit = match.groups()
    if re.match("[+-]?0[0-9]", number):  # octal to some readers, decimal to others
        raise ValueError(f"`{text}` begins with a zero")
    if unit and unit not in units:
        spellings = [known for known in units if known.lower() == unit.lower()]
        meant = f", did you mean `{number}{spellings[-1]}`?" if spellings else ""
        raise ValueError(f"`{unit}` in `{text}` is not one of the units {', '.join(units)}{meant}")
    decimal = Decimal(number.replace("_", ""))
    if decimal and abs(decimal.adjusted()) > _DIGITS:
        raise ValueError(f"`{text}` is too large" if decimal.adjusted() > 0 else f"`{text}` is not a whole number")
    value = Fraction(decimal) * units.get(unit, 1)
    if value.denominator != 1:
        raise ValueError(f"`{text}` is not a whole number")
    if abs(value) > LARGEST:
        raise ValueError(f"`{text}` is too large")
    return int(value)


def format_quantity(value: int, units: Mapping[str, int]) -> str:
    """Returns the shortest spelling that `parse_quantity` reads as exactly `value`: 1800000000 -> `1.8B`."""
    spellings = [str(value)]
    for unit, factor in units.items():
        number = Decimal(value) / factor
        if number.as_tuple().exponent == 0 or len(str(number)) < 20:
            plain = f"{number.normalize():f}{unit}"
            if parse_exactly(plain, units) == value:
                spellings.append(plain)
    return min(spellings, key=len)


def parse_exactly(text: str, units: Mapping[str, int]) -> int | None:
    """Calls `parse_quantity` and returns None for what it refuses."""
    try:
        return parse_quantity(text, units)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the teacher's value, held exactly: `80%` is 4/5."""

    of_one: Fraction

    @classmethod
    def parse(cls, text: str) -> Share:
        """Parses a share: `80%` -> 4/5. ValueError, whose text says what is wrong, for anything else."""
        match = _PERCENT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"`{text}` is not a percentage")
        number = Decimal(match.group(1).replace("_", ""))
        if number and abs(number.adjusted()) > _DIGITS:
            raise ValueError(f"`{text}` is out of all proportion")
        return cls(Fraction(number) / 100)

    def of(self, width: int, multiple: int = 1) -> int:
        """Returns this share of `width`, rounded down to a multiple of `multiple`."""
        return int(self.of_one * width) // multiple * multiple

    def __float__(self) -> float:
        return float(self.of_one)

    def __str__(self) -> str:
        hundredths = self.of_one * 100
        number = Decimal(hundredths.numerator) / Decimal(hundredths.denominator)
        return f"{number.normalize():f}%"


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Span(Generic[Value]):
    """A range that a search looks through: from `least` to `most`, both included, in steps of `step` where one is given."""

    least: Value
    most: Value
    step: int | None = None


def default_multiple(teacher_width: int) -> int:
    """Returns the multiple that a share of a width is rounded down to, unless the spec sets `multiple_of`.

    64 keeps matrix products on the fast tile sizes of GPUs; for widths under 1024 rounding to 64 would lose too much.
    """
    return 64 if teacher_width >= 1024 else 8
