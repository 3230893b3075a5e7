"""The part of the report that shows the course of training."""

from __future__ import annotations

import re
from collections.abc import Sequence

from minitron.cli import figures
from minitron.cli.report.charts import Reference, line_chart
from minitron.cli.report.curves import Curves, Figure
from minitron.cli.report.markup import Markup, element
from minitron.cli.report.tables import details, table
from minitron.cli.results_sections import MODELS
from minitron.cli.sections import Column, Document, part

# The first ones in this order; whatever else a record holds follows under its own name.
_TITLES = {
    "loss": "Training loss",
    "held_out_loss": "Held-out loss (nats a token)",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilisation",
    "grad_norm": "Gradient norm",
}
# The exponential of the held-out loss says nothing that the loss does not, and the most memory so far is one number.
_NOT_DRAWN = frozenset({"held_out_perplexity", "memory_bytes"})


def training_curves(name: str, curves: Curves, references: Sequence[Reference]) -> Markup:
    """Returns a chart for every figure of a metrics.jsonl and one table with the numbers of all. `name` is unique on
    the page; the held-out loss is drawn beside `references`.
    """
    keys = _keys(curves)
    charts = [_chart(name, key, curves.of(key), references if key == "held_out_loss" else ()) for key in keys]
    return element(
        "div",
        element("p", *_reading(curves), class_="note"),
        element("div", *charts, class_="charts"),
        details("The numbers", _table(curves, keys)),
    )


def _reading(curves: Curves) -> list[str]:
    """Returns sentences that explain how to read the charts."""
    said = [f"{figures.count(curves.records)} steps"]
    if curves.each > 1:
        said.append(
            f", drawn as {figures.count(len(curves.points))} points: each is the mean of up to {curves.each} steps in a "
            "row, the band around it goes from the lowest to the highest of them"
        )
    said.append(".")
    if curves.not_finite:
        said.append(f" {figures.count(curves.not_finite)} figures were not finite numbers and are left out.")
    return said


def _keys(curves: Curves) -> list[str]:
    found = [key for key in curves.keys if key not in _NOT_DRAWN]
    ordered = [*(key for key in _TITLES if key in found), *(key for key in found if key not in _TITLES)]
    # A loss of one term is that term: the same curve is not drawn twice.
    loss = curves.of("loss")
    return [key for key in ordered if key == "loss" or not _same(curves.of(key), loss)]


def _same(a: list[tuple[float, Figure]], b: list[tuple[float, Figure]]) -> bool:
    return bool(b) and len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))


def held_out_references(results: Document) -> list[Reference]:
    """Returns the losses of teacher and pruned student on the text that training measures its held-out loss on."""
    models = part(results, "models")
    losses = [(name, part(part(models, name), "held_out").get("loss")) for name in MODELS if name != "distilled"]
    return [Reference(name.replace("_", " "), float(loss)) for name, loss in losses if isinstance(loss, int | float)]


def _chart(name: str, key: str, curve: list[tuple[float, Figure]], references: Sequence[Reference]) -> Markup:
    title = _TITLES.get(key, key.replace("_", " "))
    place = "-".join([name, *(word for word in re.split(r"\W|_", key) if word)])
    return element("figure", element("figcaption", title), line_chart(place, title, curve, references))


def _table(curves: Curves, keys: list[str]) -> Markup:
    columns = (Column("tokens", right=True), *(Column(key, right=True) for key in keys))
    rows = [
        (
            figures.count(point.tokens),
            *(figures.decimal(point.figures[key].mean) if key in point.figures else "" for key in keys),
        )
        for point in curves.points
    ]
    return table("Training by tokens", columns, rows)
