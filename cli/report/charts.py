"""Charts as inline SVG: no script, no fonts of their own, colours from the page's style (light and dark).

Every chart has a title and a description for those who do not see it, and hovering shows its values. The numbers stand
in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from minitron.cli import figures
from minitron.cli.report.axis import Scale, scale, tick_label
from minitron.cli.report.curves import Figure
from minitron.cli.report.markup import Markup, element
from minitron.cli.report.scores import Marks, Values

# Up to this many values are drawn as a bar each, in the teacher's order; more are ranked and drawn in this many columns.
BARS, COLUMNS = 64, 120
# A curve with so few points has a dot on each.
_DOTS = 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 12.0, 10.0, 46.0
# Between the labels of two references: a line of text where it is largest, on a phone.
_LABEL_GAP = 20.0


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare a curve with."""

    label: str
    value: float


def line_chart(
    name: str, title: str, curve: Sequence[tuple[float, Figure]], references: Sequence[Reference] = ()
) -> Markup:
    """Draws one figure over the training tokens: its mean at every point, and a band from lowest to highest where a
    point stands for several steps. `name` is unique on the page.
    """
    width, height = 620.0, 230.0
    places = [tokens for tokens, _ in curve]
    reached = [value for _, figure in curve for value in (figure.low, figure.high)]
    x = Scale(min(places), max(places), _LEFT, width - _RIGHT)
    y = scale([*reached, *(one.value for one in references)], height - _BOTTOM, _TOP)
    line = " ".join(f"{x(tokens):.1f},{y(figure.mean):.1f}" for tokens, figure in curve)
    upper = [f"{x(tokens):.1f},{y(figure.high):.1f}" for tokens, figure in curve]
    lower = [f"{x(tokens):.1f},{y(figure.low):.1f}" for tokens, figure in reversed(curve)]
    merged = any(figure.count > 1 for _, figure in curve)
    first, last = curve[0][1].mean, curve[-1][1].mean
    described = f"From {figures.decimal(first)} at {figures.count(places[0])} tokens to {figures.decimal(last)} at "
    described += f"{figures.count(places[-1])}."
    return _svg(
        name,
        title,
        described + "".join(f" {one.label}: {figures.decimal(one.value)}." for one in references),
        width,
        height,
        *_grid(x, y, width, height),
        *_references(references, y, width),
        element("polygon", points=" ".join([*upper, *lower]), class_="band") if merged else None,
        element("polyline", points=line, class_="curve"),
        *(_dot(tokens, figure, x, y, seen=len(curve) <= _DOTS) for tokens, figure in curve),
    )


def score_chart(name: str, title: str, values: Values, kept: Marks, *, wide: bool) -> Markup:
    """Draws scores, kept and dropped: a bar each in the teacher's order, or ranked from the highest where there are
    many.
    """
    width, height = (620.0, 150.0) if wide else (200.0, 96.0)
    bars = len(values) <= BARS
    left = _LEFT if wide else 6.0
    bottom = height - (18.0 if bars else 6.0)
    y = scale([float(values.max(initial=0.0)), float(values.min(initial=0.0))], bottom, 6.0, zero=True)
    draw = _bars if bars else _ranked
    shape = "Bars in the teacher's order." if bars else "Ranked from the highest."
    ticks = y.ticks(3) if wide else []
    return _svg(
        name,
        title,
        f"{int(kept.sum())} of {len(values)} kept. {shape}",
        width,
        height,
        *(element("line", x1=left, x2=width - 6, y1=y(one), y2=y(one), class_="grid") for one in ticks),
        *(element("text", tick_label(one), x=left - 6, y=y(one) + 4, class_="tick end") for one in ticks),
        element("line", x1=left, x2=width - 6, y1=y(0), y2=y(0), class_="base"),
        *draw(values, kept, Scale(0, 1, left, width - 6), y),
    )


def _bars(values: Values, kept: Marks, x: Scale, y: Scale) -> list[Markup]:
    step = (x.end - x.start) / max(1, len(values))
    every = -(-len(values) // max(1, int((x.end - x.start) / 30)))
    drawn = []
    for index, (value, stays) in enumerate(zip(values.tolist(), kept.tolist(), strict=True)):
        word = "kept" if stays else "dropped"
        at = x.start + index * step
        hover = element("title", f"{index}: {figures.decimal(value)}, {word}")
        top, height = min(y(value), y(0)), max(0.5, abs(y(value) - y(0)))
        drawn.append(element("rect", hover, x=at + step * 0.12, y=top, width=step * 0.76, height=height, class_=word))
        # Not by colour alone: what is dropped has a cross under its bar.
        if index % every == 0 or not stays:
            label = str(index) if stays else "×"
            drawn.append(
                element(
                    "text",
                    label,
                    x=at + step / 2,
                    y=y.start + 14,
                    class_="tick middle" if stays else "tick middle dropped",
                )
            )
    return drawn


def _ranked(values: Values, kept: Marks, x: Scale, y: Scale) -> list[Markup]:
    order = np.argsort(-values, kind="stable")
    columns = np.array_split(order, min(COLUMNS, len(order)))
    step = (x.end - x.start) / len(columns)
    stays = [2 * int(kept[column].sum()) >= len(column) for column in columns]
    drawn = []
    # Neighbours with the same fate are one outline: columns side by side would show hairlines between them.
    for fate, run in groupby(range(len(columns)), key=lambda index: stays[index]):
        indices = list(run)
        tops = "".join(f"V{y(float(values[columns[index]].mean())):.1f}h{step:.2f}" for index in indices)
        word = "kept" if fate else "dropped"
        outline = f"M{x.start + indices[0] * step:.1f} {y(0):.1f}{tops}V{y(0):.1f}z"
        drawn.append(element("path", element("title", word), d=outline, class_=word))
    return drawn


@dataclass(frozen=True)
class Spot:
    """One point of a scatter chart: its label is shown where the pointer rests on it."""

    x: float
    y: float
    label: str
    best: bool = False


def front(spots: Sequence[Spot]) -> list[Spot]:
    """Returns the Pareto front, from left to right: the points that no other is left of and below, or as far."""
    found: list[Spot] = []
    for spot in sorted(spots, key=lambda one: (one.x, one.y)):
        if not found or spot.y < found[-1].y:
            found.append(spot)
    return found


def scatter_chart(name: str, title: str, spots: Sequence[Spot], across: str) -> Markup:
    """Draws points, the best one larger, and through those of the Pareto front a line; `across` labels the horizontal axis."""
    width, height = 620.0, 230.0
    x = scale([spot.x for spot in spots], _LEFT, width - _RIGHT)
    y = scale([spot.y for spot in spots], height - _BOTTOM, _TOP)
    on_front = front(spots)
    line = " ".join(f"{x(one.x):.1f},{y(one.y):.1f}" for one in on_front)
    described = f"{len(spots)} points, {len(on_front)} of them on the front: " + "; ".join(
        one.label for one in on_front
    )
    return _svg(
        name,
        title,
        described + ".",
        width,
        height,
        *_grid(x, y, width, height, across),
        element("polyline", points=line, class_="curve"),
        *(
            element(
                "circle", element("title", one.label), cx=x(one.x), cy=y(one.y), r=5 if one.best else 3, class_="dot"
            )
            for one in spots
        ),
    )


def _grid(x: Scale, y: Scale, width: float, height: float, across: str = "tokens") -> list[Markup]:
    drawn = []
    for value in y.ticks():
        drawn.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        drawn.append(element("text", tick_label(value), x=_LEFT - 6, y=y(value) + 4, class_="tick end"))
    for value in x.ticks(6):
        drawn.append(element("text", tick_label(value), x=x(value), y=height - 28, class_="tick middle"))
    drawn.append(element("text", across, x=width - _RIGHT, y=height - 2, class_="tick end"))
    return drawn


def _references(references: Sequence[Reference], y: Scale, width: float) -> list[Markup]:
    """Draws a line for each reference with its label above it, lower where another label stands there."""
    drawn, taken = [], -math.inf
    for one in sorted(references, key=lambda reference: y(reference.value)):
        at = y(one.value)
        taken = max(at - 4, taken + _LABEL_GAP)
        drawn.append(
            element(
                "g",
                element("line", x1=_LEFT, x2=width - _RIGHT, y1=at, y2=at, class_="reference"),
                element("text", one.label, x=width - _RIGHT, y=taken, class_="tick end"),
            )
        )
    return drawn


def _dot(tokens: float, figure: Figure, x: Scale, y: Scale, *, seen: bool) -> Markup:
    words = f"{figures.count(tokens)} tokens: {figures.decimal(figure.mean)}"
    if figure.count > 1:
        words += f" ({figures.decimal(figure.low)} to {figures.decimal(figure.high)} over {figure.count} steps)"
    hover = element("title", words)
    return element(
        "circle", hover, cx=x(tokens), cy=y(figure.mean), r=2.5 if seen else 5, class_="dot" if seen else "hit"
    )


def _svg(name: str, title: str, description: str, width: float, height: float, *drawn: Markup | None) -> Markup:
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *drawn,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=int(width),
        height=int(height),
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
