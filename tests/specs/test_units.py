"""Numbers with units are exact, and what cannot be one says why."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs.units import (
    BYTES_UNITS,
    COUNT_UNITS,
    FLOPS_UNITS,
    LARGEST,
    Share,
    default_multiple,
    format_quantity,
    parse_quantity,
)

UNITS = st.sampled_from([COUNT_UNITS, FLOPS_UNITS, BYTES_UNITS])


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("380B", COUNT_UNITS, 380_000_000_000),
        ("8.0B", COUNT_UNITS, 8_000_000_000),
        ("1.8B", COUNT_UNITS, 1_800_000_000),
        ("1 000", COUNT_UNITS, None),
        ("1_000", COUNT_UNITS, 1000),
        ("3e6", COUNT_UNITS, 3_000_000),
        ("1.5e3 K", COUNT_UNITS, 1_500_000),
        ("16G", FLOPS_UNITS, 16 * 10**9),
        ("24GiB", BYTES_UNITS, 24 * 2**30),
        ("0.5KiB", BYTES_UNITS, 512),
        ("24GB", BYTES_UNITS, 24 * 10**9),
        ("7B", BYTES_UNITS, 7),
    ],
)
def test_units_multiply_exactly(text: str, units: Mapping[str, int], value: int | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="is not a number"):
            parse_quantity(text, units)
    else:
        assert parse_quantity(text, units) == value


@pytest.mark.parametrize(
    ("text", "units", "message"),
    [
        ("", COUNT_UNITS, "is not a number"),
        ("010", COUNT_UNITS, "`010` begins with a zero"),
        ("many", COUNT_UNITS, "`many` is not a number"),
        ("1.5", COUNT_UNITS, "is not a whole number"),
        ("0.1KiB", BYTES_UNITS, "is not a whole number"),
        ("3b", COUNT_UNITS, "did you mean `3B`"),
        ("24gib", BYTES_UNITS, "did you mean `24GiB`"),
        ("3G", COUNT_UNITS, "is not one of the units K, M, B, T"),
        ("1e999999999", COUNT_UNITS, "is too large"),
        ("9223372036854775808", COUNT_UNITS, "is too large"),
        ("1e-999999999", COUNT_UNITS, "is not a whole number"),
    ],
)
def test_what_is_no_quantity_says_why(text: str, units: Mapping[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_quantity(text, units)


@given(st.integers(0, LARGEST), UNITS)
def test_what_is_written_is_read_back(value: int, units: Mapping[str, int]) -> None:
    text = format_quantity(value, units)
    assert parse_quantity(text, units) == value
    assert len(text) <= len(str(value))


@given(st.integers(1, 999), UNITS.flatmap(lambda units: st.tuples(st.just(units), st.sampled_from(list(units)))))
def test_round_quantities_are_written_with_their_unit(number: int, unit: tuple[Mapping[str, int], str]) -> None:
    units, name = unit
    value = number * units[name]
    if value <= LARGEST:
        assert len(format_quantity(value, units)) <= len(f"{number}{name}")


@given(st.decimals(0, 100, places=4), st.integers(1, 10**6), st.integers(1, 128))
def test_a_share_is_exact_and_rounded_down(percent: object, width: int, multiple: int) -> None:
    share = Share.parse(f"{percent}%")
    assert share.of_one == Fraction(str(percent)) / 100
    kept = share.of(width, multiple)
    assert kept % multiple == 0 and kept <= share.of_one * width < kept + multiple
    assert Share.parse(str(share)) == share


def test_seventy_percent_of_ten_is_seven() -> None:
    assert Share.parse("70%").of(10) == 7 and str(Share.parse("70.50 %")) == "70.5%"


@pytest.mark.parametrize("text", ["80", "%", "eighty%", "1e999999999%", "80 %%"])
def test_what_is_no_share_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a percentage|out of all proportion"):
        Share.parse(text)


def test_wide_widths_stay_on_fast_tile_sizes() -> None:
    assert Share.parse("80%").of(5120, default_multiple(5120)) == 4096
    assert Share.parse("75%").of(1100, default_multiple(1100)) == 768
    assert Share.parse("75%").of(172, default_multiple(172)) == 128
