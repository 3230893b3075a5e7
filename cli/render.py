"""Sections on a terminal and in markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from minitron.cli.sections import Document, Section

FORMAT_VERSION = 1


def terminal(sections: Iterable[Section]) -> RenderableType:
    """Sections as rich tables; nothing in a cell is read as markup or as a control sequence."""
    parts: list[RenderableType] = []
    for section in sections:
        if parts:
            parts.append(Text())
        parts.append(Text(section.title, style="bold"))
        if section.columns:
            parts.append(_table(section))
        parts += [Text(f"  {printable(note)}") for note in section.notes]
    return Group(*parts)


def markdown(sections: Iterable[Section]) -> str:
    """Sections as GitHub markdown, ending in a newline: what a pull request shows."""
    blocks = []
    for section in sections:
        lines = [f"### {_cell(section.title)}", ""]
        if section.columns:
            lines.append(_row(column.name for column in section.columns))
            lines.append("|" + "|".join("--:" if column.right else "---" for column in section.columns) + "|")
            lines += [_row(row) for row in section.rows]
            lines.append("")
        for note in section.notes:
            lines += [_cell(note), ""]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def document(content: Document) -> str:
    """One JSON document with its `format_version` first, as every `--json` prints it."""
    return json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2, ensure_ascii=False)


def printable(text: str) -> str:
    """`text` without what moves a cursor: a model may write any byte, and a terminal obeys some of them."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
    for column in section.columns:
        table.add_column(Text(column.name), justify="right" if column.right else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    escaped = printable(text).replace("\\", "\\\\")
    for mark in "|*`<>":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped.replace("\t", " ").replace("\n", "<br>")


def stdout_console() -> Console:
    """Where results go. A pipe has no width, so tables are not folded there as they are on a narrow terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    return console


def stderr_console() -> Console:
    """Where messages and progress go."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def write(*lines: str) -> None:
    """Lines of a result, on stdout."""
    for line in lines:
        sys.stdout.write(line.rstrip("\n") + "\n")


def say(*lines: str) -> None:
    """Messages, on stderr: one line each, never folded, so that paths in them can be copied."""
    for line in lines:
        sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def show_sections(
    sections: Iterable[Section], content: Document, *, as_json: bool = False, as_markdown: bool = False
) -> None:
    """Writes a result to stdout: as the JSON document it was made from, as markdown, or as tables."""
    if as_json:
        write(document(content))
    elif as_markdown:
        write(markdown(sections))
    else:
        stdout_console().print(terminal(sections))
