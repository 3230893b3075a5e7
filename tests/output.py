"""Holds what commands print and write against the documented schema."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator

from minitron.specs.output_reference import output_schema


def conforms(name: str, document: Any) -> None:
    """Fails where `document` is not what docs/json.md says of `name`."""
    schema = output_schema()
    validator = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]})
    problems = [
        f"{'.'.join(map(str, one.absolute_path))}: {one.message[:200]}" for one in validator.iter_errors(document)
    ]
    assert not problems, "\n".join(problems)
