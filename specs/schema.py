"""The JSON Schema of specs, for editors. What must hold between values is left to `minitron validate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minitron.specs.references import EXTENDS
from minitron.specs.spec import Spec

JsonSchema = dict[str, Any]


def json_schema() -> JsonSchema:
    """Returns the schema as a draft 2020-12 document."""
    schema = _tidied(Spec.model_json_schema())
    assert isinstance(schema, dict)
    extends = {
        "type": "string",
        "minLength": 1,
        "description": "A spec, relative to this file, that this one changes: mappings merge, the rest replaces.",
    }
    schema["properties"] = {EXTENDS: extends} | schema["properties"]
    # A name has a default that only the loader knows, and a base may bring the rest.
    required = [key for key in schema.pop("required") if key != "name"]
    schema["anyOf"] = [{"required": required}, {"required": [EXTENDS]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "minitron spec"} | schema


def json_schema_text() -> str:
    """Returns the schema as `minitron schema` prints it and as it is committed beside this module."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _tidied(node: Any) -> Any:
    """Removes what is of no use to somebody who edits a spec: titles made from Python names, and defaults of whole
    blocks."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    tidy: JsonSchema = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):
            tidy[key] = {name: _tidied(item) for name, item in value.items()}
        elif key == "description":
            tidy[key] = " ".join(value.split())
        elif key != "title" and not (key == "default" and (value is None or isinstance(value, dict))):
            tidy[key] = _tidied(value)
    return tidy
