"""The formatting of figures for people, the same in the terminal, in markdown and in progress lines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

NOTHING = "-"
# A per-layer list with more runs of equal values than this is written as its range: nobody reads 40 numbers in a cell.
MAX_RUNS = 6
_SECONDS_A_DAY = 86_400


def count(value: int | float | None) -> str:
    """Formats an exact count with thousands separators: 260032 -> `260,032`."""
    return NOTHING if value is None else f"{round(value):,}"


def short(value: float | None) -> str:
    """Formats a count for narrow places, with three digits and a decimal unit: 3000000 -> `3.00M`, 999 -> `999`."""
    if value is None:
        return NOTHING
    number = float(value)
    if number == int(number) and abs(number) < 1000:
        return f"{number:.0f}"
    for unit in ("", "k", "M", "G", "T", "P"):
        # 999.5 would be rounded up to 1000 of this unit, so it is 1.00 of the next one.
        if abs(number) < 999.5:
            return _three_digits(number) + unit
        number /= 1000
    return f"{_three_digits(number)}E"


def size(value: int | float | None) -> str:
    """Formats bytes in binary units, as specs write them: 1572864 -> `1.50 MiB`."""
    if value is None:
        return NOTHING
    number = float(value)
    if abs(number) < 1024:
        return f"{number:.0f} B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1023.5:
            return f"{_three_digits(number)} {unit}"
        number /= 1024
    return f"{_three_digits(number)} TiB"


def percent(part: float | None, whole: float | None = 1.0) -> str:
    """Formats `part` of `whole` as a percentage with one decimal; `NOTHING` where `whole` is missing or zero."""
    if part is None or not whole:
        return NOTHING
    return f"{100 * part / whole:.1f}%"


def decimal(value: float | None, digits: int = 4) -> str:
    """Formats a measured figure: 1.2345678 -> `1.235`; very large and very small ones in scientific notation."""
    if value is None:
        return NOTHING
    return f"{value:.{digits}g}"


def measured(key: str, value: float | str) -> tuple[str, str]:
    """Formats name and value of a figure of a running task: a name that ends in `_bytes` makes the value a size, `mfu`
    makes it a percentage.
    """
    name = key.removesuffix("_bytes").replace("held_out_", "held-out ").replace("_", " ")
    if isinstance(value, str):
        return name, value
    if key.endswith("_bytes"):
        return name, size(value)
    return name, percent(value) if key == "mfu" else decimal(value)


def duration(seconds: float | None) -> str:
    """Formats a time left or taken: `42s`, `3m05s`, `2h10m`, `4d03h`."""
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < _SECONDS_A_DAY:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // _SECONDS_A_DAY}d{whole % _SECONDS_A_DAY // 3600:02d}h"


def about(seconds: float | None) -> str:
    """Formats an estimated time in one unit: `under 1 s`, `42 s`, `3 min`, `2.5 h`, `12 days`."""
    if seconds is None:
        return NOTHING
    for unit, length, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 2 * _SECONDS_A_DAY)):
        if seconds < limit:
            value = seconds / length
            return f"under 1 {unit}" if value < 1 else f"{value:.1f} {unit}" if unit == "h" else f"{value:.0f} {unit}"
    return f"{seconds / _SECONDS_A_DAY:.{1 if seconds < 10 * _SECONDS_A_DAY else 0}f} days"


def plural(number: int, noun: str) -> str:
    """Formats a number with its noun: `1 step`, `1,000 steps`."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def hours(value: float | None) -> str:
    """Formats device-hours, from a tenth of a second to years: 0.004 -> `0.004`, 1234.5 -> `1,235`."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def width(value: object) -> str:
    """Formats a width of a plan: a number, or a per-layer list as runs: `[128, 128, 96]` -> `128 x2, 96`."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        return str(value)
    if isinstance(value, int | float):
        return count(value) if value == round(value) else decimal(value)
    runs = [(one, len(list(same))) for one, same in groupby(value)]
    if not runs:
        return NOTHING
    if len(runs) == 1:
        return width(runs[0][0])
    if len(runs) > MAX_RUNS:
        return f"{width(min(value))} to {width(max(value))} over {len(value)} layers"
    return ", ".join(width(one) + (f" x{times}" if times > 1 else "") for one, times in runs)


def kept(indices: Sequence[int], show: int = 8) -> str:
    """Formats a list of kept indices; of a long list only the ends: `0 1 2 3 ... 60 61 62 63`."""
    if len(indices) <= show:
        return " ".join(map(str, indices))
    half = show // 2
    return " ".join([*map(str, indices[:half]), "...", *map(str, indices[-half:])])


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 999.5 else f"{number:#.3g}".rstrip(".")
