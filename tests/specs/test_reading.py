"""YAML as the spec language reads it: places, numbers, quotes, anchors, and files that are no YAML at all."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs.errors import SpecInvalid
from minitron.specs.source import Mapping, Scalar, Sequence, YesNo, plain, read_text, scalar_value
from tests.specs.conftest import Errors, Load
from tests.specs.specimens import SHORTEST


def read(text: str) -> object:
    node, errors = read_text(text, "spec.yaml")
    assert not errors
    return plain(node)


def mistakes(text: str) -> list[str]:
    """`line:column: message` of every mistake in a text."""
    try:
        errors = read_text(text, "spec.yaml")[1]
    except SpecInvalid as error:
        errors = error.errors
    return [f"{error.line}:{error.column}: {error.message}" for error in errors]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("4.5e-7", 4.5e-7),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("yes", YesNo("yes")),
        ("Off", YesNo("Off")),
        ("y", "y"),
        ("010", "010"),
        ("380B", "380B"),
        ("80%", "80%"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_what_a_bare_value_means(text: str, value: object) -> None:
    found = scalar_value(text)
    assert found == value and type(found) is type(value)


@given(st.floats(allow_nan=False))
def test_a_float_in_any_spelling_is_that_float(number: float) -> None:
    spelling = repr(number).replace("inf", ".inf")
    assert scalar_value(spelling) == number
    assert scalar_value(f"{number:e}".replace("inf", ".inf")) == float(f"{number:e}")


def test_not_a_number_is_read_as_one() -> None:
    value = scalar_value(".nan")
    assert isinstance(value, float) and math.isnan(value)


@given(st.text())
def test_no_scalar_breaks_the_reader(text: str) -> None:
    scalar_value(text)


def test_quotes_make_text() -> None:
    assert read("""[1, "1", 'off', "null", "1e-4"]""") == [1, "1", "off", "null", "1e-4"]


def test_every_key_and_value_has_its_place() -> None:
    root, _ = read_text("a: 1\nbb:\n  - é: 2\n    c: {d: 3}\n", "spec.yaml")
    assert isinstance(root, Mapping)
    items = root.entries["bb"].node
    assert isinstance(items, Sequence) and isinstance(items.items[0], Mapping)
    inner = items.items[0].entries
    value = inner["é"].node
    deepest = inner["c"].node
    assert isinstance(deepest, Mapping)
    places = [
        root.entries["bb"].place,
        inner["é"].place,
        value.place,
        inner["c"].place,
        deepest.entries["d"].node.place,
    ]
    assert [(place.line, place.column) for place in places] == [(2, 1), (3, 5), (3, 8), (4, 5), (4, 12)]


def test_duplicate_keys_are_all_found_with_the_first_line() -> None:
    assert mistakes("a: 1\nb: {c: 1, c: 2}\na: 3\n") == [
        "2:11: the key `c` stands twice, first at line 2",
        "3:1: the key `a` stands twice, first at line 1",
    ]


def test_anchors_aliases_and_merge_keys() -> None:
    text = "base: &base {a: 1, b: [2]}\nmore: &more {c: 3}\none: {<<: *base, a: 9}\n"
    values = read(text + "two: {<<: [*more, *base]}\nthree: *base\n")
    assert isinstance(values, dict)
    assert values["one"] == {"a": 9, "b": [2]}
    assert values["two"] == {"a": 1, "b": [2], "c": 3}
    assert values["three"] == {"a": 1, "b": [2]}


def test_a_merged_value_has_the_place_it_is_written_at(errors_of: Errors) -> None:
    text = "distill: {loss: &loss {logits: {weight: -1}}, tokens: 1B, data: {text: [a]}}\n" + SHORTEST
    errors = errors_of(text + "evaluate: {<<: *loss}\n")
    assert [(error.line, error.column, error.path) for error in errors] == [
        (1, 24, "evaluate.logits"),
        (1, 41, "distill.loss.logits.weight"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: *nothing\n", "1:4: `*nothing` names no anchor before it"),
        ("a: &a [*a]\n", "1:8: `*a` stands inside what it names"),
        ("a: {<<: 3}\n", "1:9: `<<` merges mappings only"),
        ("? [a]\n: 1\n", "1:3: a key must be a word"),
        ("a: !!python/object:os.system x\n", "1:4: the tag `tag:yaml.org,2002:python/object:os.system` is not part"),
        ("a: 1\n---\nb: 2\n", "2:1: a second document begins here"),
        ("a:\n\tb: 1\n", "2:1: a tab indents this line"),
        ("a: [1, 2\nb: 3\n", "2:2: not valid YAML"),
        ('a: "open\n', "2:1: not valid YAML"),
        ("a: b: c\n", "1:5: a second colon stands in this value"),
        ("a:\n  width:24\n  b: 2\n", "2:3: no space stands behind the colon of `width`"),
        ("a:\n  width:\u00a024\n\n  b: 2\n", "2:3: no space stands behind the colon of `width`"),
        ("- width\uff1a 24\n  b: 2\n", "1:3: no space stands behind the colon of `width`"),
        ("a:\n  - http://x\n   b: 2\n", "3:5: not valid YAML"),
        ("a: @home\n", "1:4: not valid YAML"),
        ("a: 1\n b: 2\n", "2:3: not valid YAML"),
        ("a: \x00\n", "1:4: unreadable character U+0000"),
        ("[" * 100 + "]" * 100, "1:41: is nested too deeply"),
    ],
)
def test_what_is_not_yaml_is_one_error_at_its_place(text: str, expected: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "the file is empty"),
        (b"# nothing but a comment\n", 1, "the file is empty"),
        (b"- a\n- b\n", 1, "a spec is a mapping"),
        (b"just words\n", 1, "a spec is a mapping"),
        (b"name: x\nteacher: \xff\n", 2, "byte 0xff is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n", 1, "byte 0x89 is not UTF-8"),
        (b"a: " + b"x" * 2**20, 0, "more than a spec can be"),
    ],
)
def test_what_is_no_spec_at_all_is_one_error(errors_of: Errors, content: bytes, line: int, message: str) -> None:
    (error,) = errors_of(content)
    assert error.line == line and message in error.message


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + SHORTEST.replace("\n", "\r\n").encode()).spec == load(SHORTEST).spec


def test_aliases_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    started = time.process_time()
    (found,) = mistakes("\n".join(lines))
    assert "expand to more than a spec can hold" in found
    assert time.process_time() - started < 5


def test_merge_keys_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 {x: [1, 1, 1, 1, 1, 1, 1, 1]}"]
    lines += [f"a{n}: &a{n} {{l: {{<<: *a{n - 1}}}, r: {{<<: *a{n - 1}}}}}" for n in range(1, 30)]
    (found,) = mistakes("\n".join(lines))
    assert "than a spec can hold" in found


def test_nesting_is_limited_where_it_cannot_be_a_spec_any_more() -> None:
    assert mistakes("[" * 40 + "1" + "]" * 40) == []
    assert mistakes("[" * 41 + "1" + "]" * 41) == ["1:41: is nested too deeply to be a spec"]


def test_deep_brackets_do_not_exhaust_the_stack() -> None:
    (found,) = mistakes("[" * 200_000)
    assert "nested too deeply" in found


KEYS = st.text("abcdefgh", min_size=1, max_size=5)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("xyz 1-:#", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_others_write_is_read_as_it_was_meant(value: dict[str, object]) -> None:
    """JSON is YAML: whatever a JSON writer puts out comes back."""
    import json

    assert read(json.dumps(value)) == value


def test_the_reader_does_not_need_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    from minitron.specs import source

    text = "a: &x {b: 1e-4}\nc: [*x, off]\n"
    with_it = read_text(text, "spec.yaml")
    monkeypatch.setattr(source, "_PARSER", yaml.SafeLoader)
    assert read_text(text, "spec.yaml") == with_it
    assert mistakes("a:\n\tb: 1\n") == ["2:1: a tab indents this line"]


def test_a_scalar_keeps_what_the_user_wrote() -> None:
    root, _ = read_text("a: 1e-4\n", "spec.yaml")
    assert isinstance(root, Mapping)
    value = root.entries["a"].node
    assert isinstance(value, Scalar) and (value.text, value.value) == ("1e-4", 1e-4)
