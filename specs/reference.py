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
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)


def _section(title: str, block: JsonSchema, homes: dict[str, str], blocks: JsonSchema) -> str:
    required = block.get("required") or block.get("anyOf", [{}])[0].get("required", [])
    lines = [
        f"## {title}",
        "",
        block.get("description", ""),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, value in block["properties"].items():
        default = "required" if key in required else f"`{_yaml(value['default'])}`" if "default" in value else ""
        meaning = value.get("description") or blocks[next(_references(value))]["description"]
        cells = (f"`{key}`", _type(value, homes), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(node: JsonSchema, homes: dict[str, str]) -> str:
    """Describes in words the values that a schema node allows."""
    if several := node.get("anyOf") or node.get("oneOf"):
        # Leaving a key out is the way to write null, so only a key whose default is something else shows it.
        shown = [one for one in several if one != {"type": "null"} or node.get("default") is not None]
        return " or ".join(dict.fromkeys(_alternative(one, shown, homes) for one in shown))
    if "$ref" in node:
        path = homes.get(node["$ref"].rpartition("/")[2], "")
        return f"[{path}](#{path.replace('.', '').lower()})"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return " or ".join(f"`{word}`" for word in node["enum"])
    match node["type"]:
        case "array":
            return _list(node, homes)
        case "integer" | "number" as kind:
            return ("whole number" if kind == "integer" else "number") + _range(node)
        case "string" if "examples" in node:
            return f"text such as `{node['examples'][0]}`"
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "`null`"
        case "object" if "properties" in node:
            return "a range `{" + ", ".join(node["properties"]) + "}`"
        case _:
            return "text"


def _alternative(node: JsonSchema, beside: list[JsonSchema], homes: dict[str, str]) -> str:
    items = node.get("items")
    others = [one for one in beside if one is not node]
    return "a list of these" if items and items in ({"anyOf": others}, *others) else _type(node, homes)


def _list(node: JsonSchema, homes: dict[str, str]) -> str:
    if "prefixItems" in node:
        return f"[{', '.join(_type(item, homes) for item in node['prefixItems'])}]"
    return f"list of {_type(node['items'], homes)}"


def _range(node: JsonSchema) -> str:
    limits = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("exclusiveMaximum", "below"),
        ("maximum", "at most"),
    )
    # The largest numbers only keep what cannot be meant out; a reader does not need them.
    said = [f"{words} {node[key]:g}" for key, words in limits if key in node and node[key] < 2**31]
    return f" ({', '.join(said)})" if said else ""


def main() -> None:
    """Rewrites the committed schema and the references."""
    write_text(SCHEMA_FILE, json_schema_text())
    write_text(REFERENCE_FILE, reference_text())
    write_text(output_reference.REFERENCE_FILE, output_reference.output_reference_text())


if __name__ == "__main__":
    main()
