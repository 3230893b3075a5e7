"""Sections as HTML tables: the same words and order as in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from minitron.cli.report.markup import Markup, element
from minitron.cli.sections import Column, Section


def section_table(section: Section) -> Markup:
    """Returns the table of a section and the sentences below it; the section's title is the table's caption."""
    notes = [element("p", note, class_="note") for note in section.notes]
    if not section.columns:
        return element("div", element("h3", section.title), *notes)
    return element("div", table(section.title, section.columns, section.rows), *notes)


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Markup:
    """Returns a table that scrolls on its own where the page is too narrow; the first column holds the row headers."""
    head = [element("th", one.name, scope="col", class_=_side(one)) for one in columns]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=_side(columns[0])),
            *(element("td", cell, class_=_side(one)) for one, cell in zip(columns[1:], row[1:], strict=True)),
        )
        for row in rows
    ]
    inner = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def details(summary: str, *content: str | None) -> Markup:
    """Returns content that a click unfolds, without a script."""
    return element("details", element("summary", summary), *content)


def _side(column: Column) -> str | None:
    return "number" if column.right else None
