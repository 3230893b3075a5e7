"""Renders JSON Schema as Markdown: the type of a value in words, and tables of keys."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Node = Mapping[str, Any]

Link = Callable[[str], str]
"""Name of a definition in the schema -> Markdown link to where it is described."""

WIDTH = 120

_LIMITS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("exclusiveMaximum", "below"),
    ("maximum", "at most"),
)
_WORDS = {
    "object": "object", "array": "list", "integer": "whole number", "string": "text", "boolean": "`true` or `false`",
    "null": "`null`",
}  # fmt: skip


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [headings, ["---"] * len(headings)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in [*lines, *escaped]
    ]


def paragraph(text: str) -> list[str]:
    """Returns the lines of a paragraph, filled to the width of the other pages."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False) or [""]


def referenced(node: Node) -> str:
    """Returns the name of the definition that a `$ref` names."""
    return str(node["$ref"]).rpartition("/")[2]


@dataclass(frozen=True)
class TypeWords:
    """Describes in words the values that a schema node allows.

    link        where a definition is described
    of_output   for what is written and not read: null is shown, though leaving a key out says it as well, and the keys
                of an object have rows of their own
    """

    link: Link
    of_output: bool

    def __call__(self, node: Node) -> str:
        if several := node.get("anyOf") or node.get("oneOf"):
            hidden = not self.of_output and node.get("default") is None
            shown = [one for one in several if one != {"type": "null"} or not hidden]
            return " or ".join(dict.fromkeys(self._alternative(one, shown) for one in shown))
        if "$ref" in node:
            return self.link(referenced(node))
        if "const" in node:
            return f"`{node['const']}`"
        if "enum" in node:
            return " or ".join(f"`{word}`" for word in node["enum"])
        if "prefixItems" in node:
            return f"[{', '.join(self(item) for item in node['prefixItems'])}]"
        kinds = node.get("type", "any")
        return " or ".join(self._one_type(kind, node) for kind in ([kinds] if isinstance(kinds, str) else kinds))

    def _one_type(self, kind: str, node: Node) -> str:
        if kind == "array" and isinstance(items := node.get("items"), dict) and "properties" not in items:
            return f"list of {self(items)}"
        if kind == "string" and "examples" in node:
            return f"text such as `{node['examples'][0]}`"
        if kind == "object" and "properties" in node and not self.of_output:
            return "a range `{" + ", ".join(node["properties"]) + "}`"
        return _WORDS.get(kind, kind) + (_range(node) if kind in ("integer", "number") else "")

    def _alternative(self, node: Node, beside: Sequence[Node]) -> str:
        items = node.get("items")
        others = [one for one in beside if one is not node]
        return "a list of these" if items and items in ({"anyOf": others}, *others) else self(node)


def _range(node: Node) -> str:
    # The largest numbers only keep what cannot be meant out; a reader does not need them.
    said = [f"{words} {node[key]:g}" for key, words in _LIMITS if key in node and node[key] < 2**31]
    return f" ({', '.join(said)})" if said else ""
