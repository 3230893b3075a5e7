"""Whatever stands at whatever path: a spec is valid, or every error has a place and is in our own words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.specs import SpecInvalid, load_spec
from minitron.specs.shape import all_blocks, words_at
from minitron.specs.source import Plain, plain, read_text
from minitron.specs.spec import Spec
from tests.specs.specimens import WHOLE

KEYS = sorted({key for _, block in all_blocks(Spec) for key in block.model_fields})
PATHS = sorted({(*path.split("."), key) for path, block in all_blocks(Spec) if path for key in block.model_fields})
WORDS = sorted({word for path in PATHS for word in words_at(Spec, path)})

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.sampled_from([10**30, -(10**30)]),
    st.floats(),
    st.sampled_from([*WORDS, "", " ", "80%", "0%", "1.5B", "3GiB", "a{given}b", "<word>", "python-stdlib:x", "*.txt"]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "<word>", "<longer>"]) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def whole() -> Any:
    return plain(read_text(WHOLE, "spec.yaml")[0])


def put(spec: Plain, path: tuple[str, ...], value: object) -> None:
    for key in path[:-1]:
        assert isinstance(spec, dict)
        if not isinstance(spec.get(key), dict):
            spec[key] = {}
        spec = spec[key]
    assert isinstance(spec, dict)
    spec[path[-1]] = value  # type: ignore[assignment]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any") / "spec.yaml"


@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=4))
@settings(max_examples=400)
def test_any_value_anywhere(file: Path, changes: list[tuple[tuple[str, ...], object]]) -> None:
    spec = whole()
    for path, value in changes:
        put(spec, path, value)
    # JSON is YAML, except for how it spells what is no number.
    text = json.dumps(spec, allow_nan=True)
    file.write_text(re.sub(r"\b(NaN|Infinity)\b", lambda found: {"NaN": ".nan"}.get(found[0], ".inf"), text))
    try:
        loaded = load_spec(file)
    except SpecInvalid as invalid:
        for error in invalid.errors:
            assert error.line >= 1 and error.column >= 1
            assert error.message and error.hint
            assert "reference says" not in error.hint, f"an error of pydantic without words of ours: {error}"
            assert not re.search(r"Input should|pydantic|https://", error.message + error.hint)
    else:
        assert Spec.model_validate(loaded.resolved) == loaded.spec
