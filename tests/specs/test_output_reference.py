"""The documented layout of JSON output: a schema that says everything, and a page that says the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from minitron.specs.output_reference import REFERENCE_FILE, output_reference_text, output_schema
from tests.output import conforms


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that the schema names, by its path."""
    if isinstance(node, dict):
        for key, value in node.get("properties", {}).items():
            yield f"{path}.{key}", value
        for key, value in node.items():
            yield from nodes(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from nodes(value, f"{path}.{index}")


def test_the_schema_is_one_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(output_schema())
    named = dict(nodes(output_schema()))
    assert len(named) > 80
    assert [path for path, node in named.items() if not node.get("description")] == []


def test_the_page_is_that_of_the_schema() -> None:
    assert REFERENCE_FILE.read_text(encoding="utf-8") == output_reference_text()
    assert "| `teacher.widths` | object | Axis -> width; a list has one for each layer. |" in output_reference_text()
    assert "| `checks[].max_error` | number or `null` |" in output_reference_text()


def test_what_is_not_as_documented_is_found() -> None:
    conforms("errors", {"format_version": 1, "errors": [], "more": True})
    with pytest.raises(AssertionError, match="'errors' is a required property"):
        conforms("errors", {"format_version": 1})
    with pytest.raises(AssertionError, match=r"errors\.0: 'line' is a required property"):
        conforms(
            "errors",
            {"format_version": 1, "errors": [{"file": "a", "column": 1, "path": "", "message": "", "hint": ""}]},
        )
