"""Generates the spec reference in docs/ from the JSON Schema, so that the two cannot disagree.

`python -m minitron.specs.reference` rewrites the schema, the reference and docs/json.md in a checkout; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from minitron.specs import output_reference
from minitron.specs.atomic import write_text
from minitron.specs.schema import JsonSchema, json_schema, json_schema_text
from minitron.specs.schema_markdown import TypeWords, paragraph, referenced, table

SCHEMA_FILE = Path(__file__).resolve().parent / "minitron.schema.json"
REFERENCE_FILE = Path(__file__).resolve().parent.parent / "docs" / "spec-reference.md"

_HEAD = """# Spec reference

Every key of a spec, with its type and its default. This page is generated from the JSON Schema that `minitron schema`
prints; `minitron validate` checks, beyond it, what must hold between values.

Numbers may carry units: counts `K M B T` (`380B`), sizes `KB MB GB TB KiB MiB GiB TiB` (`24GiB`), operations
`K M G T P` (`16G`), shares `%` (`80%`).
"""


def reference_text() -> str:
    """Returns the reference as Markdown: a section for each block, a line for each of its keys."""
    schema = json_schema()
    blocks = schema["$defs"]
    homes: dict[str, str] = {}  # where a block is described, by its name in the schema: at the first path that it has
    waiting = list(_inner_blocks(schema, ""))
    while waiting:
        name, path = waiting.pop(0)
        if name not in homes:
            homes[name] = path
            waiting = [*_inner_blocks(blocks[name], path), *waiting]
    sections = [_section(f"`{path}`", blocks[name], homes, blocks) for name, path in homes.items()]
    return "\n".join([_HEAD, _section("The whole spec", schema, homes, blocks), *sections])


def _inner_blocks(block: JsonSchema, path: str) -> Iterator[tuple[str, str]]:
    """Yields (name in the schema, dotted path) of the blocks directly under the keys of a block."""
    for key, value in block["properties"].items():
        for name in _references(value):
            yield name, f"{path}.{key}".lstrip(".")


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield referenced(node)
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)


def _section(title: str, block: JsonSchema, homes: dict[str, str], blocks: JsonSchema) -> str:
    required = block.get("required") or block.get("anyOf", [{}])[0].get("required", [])

    def link(name: str) -> str:
        path = homes.get(name, "")
        return f"[{path}](#{path.replace('.', '').lower()})"

    types = TypeWords(link, of_output=False)
    rows = []
    for key, value in block["properties"].items():
        default = "required" if key in required else f"`{_yaml(value['default'])}`" if "default" in value else ""
        meaning = value.get("description") or blocks[next(_references(value))]["description"]
        rows.append((f"`{key}`", types(value), default, meaning))
    described = paragraph(block.get("description", ""))
    return "\n".join([f"## {title}", "", *described, "", *table(("key", "type", "default", "meaning"), rows)]) + "\n"


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    """Rewrites the committed schema and the references."""
    write_text(SCHEMA_FILE, json_schema_text())
    write_text(REFERENCE_FILE, reference_text())
    write_text(output_reference.REFERENCE_FILE, output_reference.output_reference_text())


if __name__ == "__main__":
    main()
