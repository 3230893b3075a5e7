"""How figures are written for people."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.cli import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (999_700, "1.00M"), (3_000_000, "3.00M"), (0.5, "0.500"), (None, "-")],
)
def test_short_counts_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert figures.short(value) == text


@given(st.floats(min_value=1e3, max_value=9e17))
def test_a_short_count_is_within_half_a_percent_of_the_number(value: float) -> None:
    digits, unit = re.fullmatch(r"([\d.]+)([kMGTP])", figures.short(value)).groups()  # type: ignore[union-attr]
    assert len(digits.replace(".", "")) == 3
    assert float(digits) * 1000.0 ** ("kMGTP".index(unit) + 1) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_572_864, "1.50 MiB"),
        (8_000_000_000, "7.45 GiB"),
        (None, "-"),
    ],
)
def test_sizes_are_binary_as_in_specs(value: int | None, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (64, "64"),
        (14336, "14,336"),
        ([128, 128, 128], "128"),
        ([128, 128, 96], "128 x2, 96"),
        (list(range(8, 80, 8)), "8 to 72 over 9 layers"),
        ([], "-"),
        (None, "-"),
        ("llama", "llama"),
    ],
)
def test_widths_are_a_number_or_the_runs_of_a_list(value: object, text: str) -> None:
    assert figures.width(value) == text


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40))
def test_the_runs_of_a_width_name_every_layer(widths: list[int]) -> None:
    text = figures.width(widths)
    if "over" in text:
        assert text == f"{min(widths)} to {max(widths)} over {len(widths)} layers"
        return
    if len(set(widths)) == 1:
        assert text == str(widths[0])
        return
    runs = [run.split(" x") for run in text.split(", ")]
    assert [int(value) for value, *times in runs for _ in range(int(times[0]) if times else 1)] == widths


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3s"), (59.7, "1m00s"), (185, "3m05s"), (7_800, "2h10m"), (356_400, "4d03h"), (None, "-")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.004, "0.004"), (3, "3"), (1234.5, "1,234"), (None, "-")])
def test_device_hours_from_seconds_to_years(value: float | None, text: str) -> None:
    assert figures.hours(value) == text


def test_percentages_of_nothing_are_nothing() -> None:
    assert figures.percent(3, 4) == "75.0%"
    assert figures.percent(3, 0) == figures.percent(None, 4) == figures.percent(3, None) == "-"


def test_long_lists_of_kept_indices_show_their_ends() -> None:
    assert figures.kept([0, 3, 4, 5]) == "0 3 4 5"
    assert figures.kept(range(64)) == "0 1 2 3 ... 60 61 62 63"
