"""Writes docs/json.md, the reference of minitron's JSON output, from output.schema.json beside this module, which tests
compare with real output. `python -m minitron.specs.reference` rewrites it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.specs.schema_markdown import TypeWords, paragraph, table

SCHEMA_FILE = Path(__file__).resolve().parent / "output.schema.json"
REFERENCE_FILE = Path(__file__).resolve().parent.parent / "docs" / "json.md"

_HEAD = """# What minitron writes as JSON

For programs that read it. `--json` prints one document and nothing else on stdout; messages and progress go to stderr.
The keys below hold for this `format_version`, and others may stand beside them. Sizes are whole numbers of bytes,
counts are whole numbers, fractions are 0 to 1. The same as JSON Schema:
[specs/output.schema.json](../specs/output.schema.json), a definition for each document.

This page is generated from that schema.
"""


def output_schema() -> dict[str, Any]:
    """Returns the schema: `$defs` has one definition per document."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def output_reference_text() -> str:
    """Returns the page: a section for each definition, a line for each key, nested keys by their dotted path."""
    sections = [_HEAD]
    for name, node in output_schema()["$defs"].items():
        lines = [f"## {name}", "", *paragraph(node["description"])]
        if rows := list(_rows(node, "")):
            lines += ["", *table(("key", "type", "meaning"), rows)]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _rows(node: dict[str, Any], above: str) -> Iterator[tuple[str, str, str]]:
    required = node.get("required", [])
    for key, value in node.get("properties", {}).items():
        path = f"{above}{key}"
        kind = _types(value) + ("" if key in required else ", may be absent")
        yield f"`{path}`", kind, value.get("description", "")
        yield from _rows(value, f"{path}.")
        if isinstance(items := value.get("items"), dict):
            yield from _rows(items, f"{path}[].")
        if isinstance(values := value.get("additionalProperties"), dict):
            yield from _rows(values, f"{path}.NAME.")


_types = TypeWords(lambda name: f"[{name}](#{name})", of_output=True)
