"""Sections as GitHub markdown. Text from others (names of models and files, reasons, texts) stays plain text: it makes
no link, no mention of a person, no reference to an issue, no markup and no new line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from minitron.cli.sections import Section
from minitron.cli.text import printable

# GitHub links mentions, issues and addresses after it has read the markdown, so that no backslash holds it off; a space of
# no width between the mark and what follows does.
_GAP = "\N{ZERO WIDTH SPACE}"
_LINKED = re.compile(r"@(?=\w)|#(?=\d)|\bGH-(?=\d)|\b\w+:(?=//)|\bwww(?=\.)|\bmailto:|\bxmpp:", re.IGNORECASE)
_MARKS = re.compile(r"[\\`*<>|~&$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)")
_STARTS = re.compile(r"^\s*(?=[#+=-])")


def markdown(sections: Iterable[Section]) -> str:
    """Renders sections as GitHub markdown, ending in a newline, for pull requests."""
    blocks = []
    for section in sections:
        lines = [f"### {cell(section.title)}", ""]
        if section.columns:
            lines.append(_row(column.name for column in section.columns))
            lines.append("|" + "|".join("--:" if column.right else "---" for column in section.columns) + "|")
            lines += [_row(row) for row in section.rows]
            lines.append("")
        for note in section.notes:
            lines += [_STARTS.sub(r"\\", cell(note)), ""]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def cell(text: str) -> str:
    """Escapes `text` for a table cell or a paragraph."""
    marked = _MARKS.sub(r"\\\g<0>", printable(text))
    return _LINKED.sub(lambda found: found[0] + _GAP, marked).replace("\t", " ").replace("\n", "<br>")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell(one) for one in cells) + " |"
