"""The part of the report that shows the score of each layer, channel, head and neuron, and which were kept."""

from __future__ import annotations

from minitron.cli import figures
from minitron.cli.report.charts import BARS, score_chart
from minitron.cli.report.markup import Markup, element
from minitron.cli.report.scores import LAYERS, Scored, ScoredAxis
from minitron.cli.report.tables import details, table
from minitron.cli.sections import Column

_COLUMNS = (
    Column("list"),
    Column("kept", right=True),
    Column("of", right=True),
    Column("lowest kept", right=True),
    Column("highest dropped", right=True),
    Column("share of the scores kept", right=True),
)


def importance(axes: list[ScoredAxis]) -> Markup:
    """Returns a chart for every list of scores, and a table for every axis."""
    legend = element(
        "p",
        element("span", "kept", class_="key kept-key"),
        element("span", "dropped (×)", class_="key dropped-key"),
        "Scores are those of the calibration samples, in the teacher's numbering. Up to "
        f"{BARS} values are bars in order; more are ranked from the highest. Scores of different lists do not compare.",
        class_="note",
    )
    return element("div", legend, *(_axis(one) for one in axes))


def _axis(axis: ScoredAxis) -> Markup:
    charts = [_chart(axis, one) for one in axis.lists]
    wide = len(charts) == 1
    figure = element("div", *charts, class_=None if wide else "small-multiples")
    whole = None if axis.chosen else element("p", "Not narrowed: everything of a kept layer stays.", class_="note")
    return element("div", element("h3", _title(axis)), whole, figure, details("The numbers", _table(axis)))


def _title(axis: ScoredAxis) -> str:
    return f"{axis.axis}: depth" if axis.axis == LAYERS else axis.axis


def _chart(axis: ScoredAxis, one: Scored) -> Markup:
    where = f"layer {one.layer}" if one.layer is not None else "the whole network"
    title = f"{axis.axis}, {where}" + (" (dropped)" if one.dropped_layer else "")
    name = f"score-{axis.axis}-{'all' if one.layer is None else one.layer}".replace("_", "-")
    chart = score_chart(name, title, one.values, one.kept, wide=len(axis.lists) == 1)
    caption = None if one.layer is None else element("figcaption", f"layer {one.layer}", _fate(one))
    return element("figure", chart, caption)


def _fate(one: Scored) -> str:
    return ", dropped whole" if one.dropped_layer else f", {int(one.kept.sum())} of {len(one.values)}"


def _table(axis: ScoredAxis) -> Markup:
    listed = all(len(one.values) <= BARS for one in axis.lists)
    columns = (*_COLUMNS, Column("scores in order, dropped ones in brackets")) if listed else _COLUMNS
    rows = [(*_row(one), _values(one)) if listed else _row(one) for one in axis.lists]
    return table(f"Scores of {axis.axis}", columns, rows)


def _row(one: Scored) -> tuple[str, ...]:
    kept, dropped = one.values[one.kept], one.values[~one.kept]
    total = float(one.values.sum())
    return (
        "whole network" if one.layer is None else f"layer {one.layer}",
        figures.count(len(kept)),
        figures.count(len(one.values)),
        figures.decimal(float(kept.min()) if len(kept) else None),
        figures.decimal(float(dropped.max()) if len(dropped) else None),
        figures.percent(float(kept.sum()), total),
    )


def _values(one: Scored) -> str:
    return " ".join(
        figures.decimal(value) if stays else f"({figures.decimal(value)})"
        for value, stays in zip(one.values.tolist(), one.kept.tolist(), strict=True)
    )
