"""Writes docs/json.md, the reference of minitron's JSON output, from output.schema.json beside this module, which tests
compare with real output. `python -m minitron.specs.reference` rewrites it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_FILE = Path(__file__).resolve().parent / "output.schema.json"
REFERENCE_FILE = Path(__file__).resolve().parent.parent / "docs" / "json.md"

_HEAD = """# What minitron writes as JSON

For programs that read it. `--json` prints one document and nothing else on stdout; messages and progress go to stderr.
The keys below hold for this `format_version`, and others may stand beside them. Sizes are whole numbers of bytes, counts
are whole numbers, fractions are 0 to 1. The same as JSON Schema:
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
        rows = ["| key | type | meaning |", "|---|---|---|"]
        rows += [f"| `{path}` | {kind} | {meaning} |" for path, kind, meaning in _rows(node, "")]
        described = node["description"]
        sections.append(f"## {name}\n\n{described}\n" + ("\n" + "\n".join(rows) + "\n" if len(rows) > 2 else ""))
    return "\n".join(sections)


def _rows(node: dict[str, Any], above: str) -> Iterator[tuple[str, str, str]]:
    required = node.get("required", [])
    for key, value in node.get("properties", {}).items():
        path = f"{above}{key}"
        yield path, _type(value) + ("" if key in required else ", may be absent"), value.get("description", "")
        yield from _rows(value, f"{path}.")
        if isinstance(items := value.get("items"), dict):
            yield from _rows(items, f"{path}[].")
        if isinstance(values := value.get("additionalProperties"), dict):
            yield from _rows(values, f"{path}.NAME.")


def _type(node: dict[str, Any]) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return " or ".join(f"`{word}`" for word in node["enum"])
    if "anyOf" in node:
        return " or ".join(_type(one) for one in node["anyOf"])
    kinds = node.get("type", "any")
    names = [_NAMES.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if isinstance(node.get("items"), dict) and "properties" not in node["items"]:
        names[0] = f"list of {_type(node['items'])}"
    return " or ".join(names)


_NAMES = {"object": "object", "array": "list", "integer": "whole number", "string": "text", "boolean": "true or false"}
