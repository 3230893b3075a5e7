"""The JSON Schema and the reference: committed, current, and of one mind with the models."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from minitron.specs import json_schema_text, recipe_names, recipe_text, starting_spec
from minitron.specs.reference import REFERENCE_FILE, SCHEMA_FILE, reference_text
from minitron.specs.schema import json_schema
from minitron.specs.shape import all_blocks
from minitron.specs.source import plain, read_text
from minitron.specs.spec import Spec
from tests.specs.specimens import SHORTEST, SMALL, WHOLE

RENEW = "run: python -m minitron.specs.reference"


def test_the_committed_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema_text(), RENEW


def test_the_committed_reference_is_current() -> None:
    assert REFERENCE_FILE.read_text(encoding="utf-8") == reference_text(), RENEW


def test_every_key_has_a_description_for_editors() -> None:
    schema = json_schema()
    for block in [schema, *schema["$defs"].values()]:
        assert block["description"] and block["additionalProperties"] is False
        for key, value in block["properties"].items():
            assert value.get("description") or schema["$defs"][value["$ref"].rpartition("/")[2]]["description"], key


def test_every_key_stands_in_the_reference() -> None:
    text = reference_text()
    for path, block in all_blocks(Spec):
        assert (
            not path
            or f"`{path}`" in text
            or path.endswith(("data.blend", "phases.data", "held_out", "held_out.blend"))
        )
        for key in block.model_fields:
            assert f"| `{key}` |" in text


def test_links_in_the_reference_lead_somewhere() -> None:
    text = reference_text()
    headings = {re.sub(r"[^\w]", "", heading).lower() for heading in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    targets = set(re.findall(r"\]\(#(\w+)\)", text))
    assert targets and targets <= headings


def valid(text: str) -> bool:
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is tried with jsonschema where it is installed")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    value: Any = plain(read_text(text, "spec.yaml")[0])
    return bool(jsonschema.Draft202012Validator(json.loads(json_schema_text())).is_valid(value))


@pytest.mark.parametrize("name", recipe_names())
def test_editors_accept_the_recipes(name: str) -> None:
    assert valid(recipe_text(name))


def test_editors_accept_what_is_valid() -> None:
    assert valid(WHOLE) and valid(SHORTEST) and valid(SMALL) and valid(starting_spec())
    assert valid("extends: base.yaml\n")
    assert valid(SMALL.replace("48", "[32, '50%']"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden_size: 48", "hiden_size: 48"),
        ("hidden_size: 48", "hidden_size: 0"),
        ("hidden_size: 48", "hidden_size: 0.8"),
        ("hidden_size: 48", "hidden_size: 80"),
        ("tokens: 1B", "tokens: 1GiB"),
        (", tokens: 1B", ""),
        ("{text: [a.txt]}, tokens", "{text: [a.txt], jsonl: b}, tokens"),
        ("{text: [a.txt]}, tokens", "{}, tokens"),
        ("model: org/teacher", "model: a, spec: b"),
        ("tokens: 1B", "tokens: 1B, teacher_logits: offline"),
        ("tokens: 1B", "tokens: 1B, optimizer: {betas: [0.9]}"),
    ],
)
def test_editors_underline_what_is_wrong(old: str, new: str) -> None:
    assert valid(SMALL.replace(old, new)) is (new == "hidden_size: 80")
