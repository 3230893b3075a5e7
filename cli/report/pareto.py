"""The part of the report that shows a search: each candidate's divergence against its size and against its cache."""

from __future__ import annotations

from minitron.cli import figures
from minitron.cli.report.charts import Spot, scatter_chart
from minitron.cli.report.markup import Markup, element
from minitron.cli.report.tables import section_table
from minitron.cli.search_sections import candidates_section
from minitron.cli.sections import Document, entries

_AXES = (
    ("parameters", "parameters", figures.short),
    ("kv_cache_bytes_per_token", "bytes of key-value cache a token", figures.size),
)


def search_chapter(search: Document) -> Markup:
    """Returns the charts and the table of a search. All candidates are drawn as the first rung left them: later rungs have
    fewer, and longer trained ones.
    """
    return element("div", element("div", *_charts(search), class_="charts"), section_table(candidates_section(search)))


def _charts(search: Document) -> list[Markup]:
    drawn = []
    for key, across, write in _AXES:
        spots = [
            Spot(
                float(one[key]),
                float(one["rungs"][0]["kl"]),
                f"candidate {one['number']}, {write(one[key])}: {figures.decimal(one['rungs'][0]['kl'])}",
                one["number"] == search.get("winner"),
            )
            for one in entries(search, "candidates")
            if one.get("rungs") and one["rungs"][0].get("kl") is not None and one.get(key) is not None
        ]
        if spots:
            title = f"Divergence after the first rung against {across}"
            chart = scatter_chart(f"search-{key.split('_')[0]}", title, spots, across)
            drawn.append(element("figure", element("figcaption", title), chart))
    return drawn
