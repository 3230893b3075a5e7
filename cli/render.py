"""Results and messages on a terminal, and the JSON document of a result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minitron.cli import output
from minitron.cli.consoles import stdout_console
from minitron.cli.markdown import markdown
from minitron.cli.sections import Document, Section
from minitron.cli.text import printable
from minitron.specs.one_line import one_line

FORMAT_VERSION = 1


def terminal(sections: Iterable[Section]) -> RenderableType:
    """Renders sections as rich tables; nothing in a cell is read as markup or as a control sequence."""
    parts: list[RenderableType] = []
    for section in sections:
        if parts:
            parts.append(Text())
        parts.append(Text(printable(section.title), style="bold"))
        if section.columns:
            parts.append(_table(section))
        parts += [Text(f"  {printable(note)}") for note in section.notes]
    return Group(*parts)


def document(content: Document) -> str:
    """Renders one JSON document with its `format_version` first, as every `--json` prints it. Characters that a
    terminal interprets are written as JSON escapes, also those that JSON itself would allow.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2, ensure_ascii=False)
    return text if text.isascii() else "".join(map(_escaped, text))


def _escaped(one: str) -> str:
    return one if one == "\n" or one_line(one) == one else json.dumps(one)[1:-1]


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
    for column in section.columns:
        table.add_column(Text(printable(column.name)), justify="right" if column.right else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def write(*lines: str) -> None:
    """Prints lines of a result to stdout."""
    for line in lines:
        sys.stdout.write(printable(line.rstrip("\n")) + "\n")


def say(*lines: str) -> None:
    """Prints messages to stderr: one line each, never folded, so that paths in them can be copied. A newline inside a
    message is written as its escape, so that quoted text cannot pass for a line of ours. With `--quiet` messages go to
    the log alone.
    """
    _tell(lines, shown=not output.quiet())


def complain(*lines: str) -> None:
    """Prints error messages: as `say`, but also with `--quiet`."""
    _tell(lines, shown=True)


def _tell(lines: Sequence[str], *, shown: bool) -> None:
    for line in map(one_line, lines):
        output.log(line)
        if shown:
            sys.stderr.write(line + "\n")
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
