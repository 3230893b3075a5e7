"""The base model of every block, and the types of values that carry units or take several forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from minitron.specs.source import YesNo
from minitron.specs.suggest import did_you_mean
from minitron.specs.units import (
    BYTES_UNITS,
    COUNT_UNITS,
    FLOPS_UNITS,
    LARGEST,
    NUMBER_PATTERN,
    Share,
    Span,
    parse_exactly,
    parse_quantity,
)


class Block(BaseModel):
    """A mapping of the spec: frozen, without unknown keys, without conversions between types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def wrong(message: str, hint: str = "") -> PydanticCustomError:
    """Builds a validation error with its own message, for validators to raise. `{given}` in `message` becomes the
    user's text."""
    return PydanticCustomError("minitron", "{message}", {"message": message, "hint": hint})


T = TypeVar("T")

# Strict models want tuples; YAML has lists. Only the list itself is converted, what is in it stays strict.
Listed: TypeAlias = Annotated[tuple[T, ...], Field(strict=False)]


# --- numbers with units ---


def _quantity(what: str, example: str, units: Mapping[str, int]) -> Callable[[Any], int]:
    hint = f"write a positive whole number, or one with a unit such as {example}"

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong(f"{{given}} is not {what}", hint)
        try:
            # repr() of a float is its shortest spelling: 3e6 is exactly three million.
            number = (
                value
                if isinstance(value, int)
                else parse_quantity(value if isinstance(value, str) else repr(value), units)
            )
        except ValueError as error:
            raise wrong(str(error) if isinstance(value, str) else f"{{given}} is not {what}", hint) from None
        if not 1 <= number <= LARGEST:
            raise wrong(f"{{given}} is not {what}", hint)
        return number

    return read


def _quantity_schema(example: str, units: Mapping[str, int]) -> WithJsonSchema:
    text = {"type": "string", "pattern": rf"^{NUMBER_PATTERN}\s*({'|'.join(units)})?$", "examples": [example]}
    return WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, text]})


Count: TypeAlias = Annotated[
    int, BeforeValidator(_quantity("a count", "8.0B", COUNT_UNITS)), _quantity_schema("8.0B", COUNT_UNITS)
]
"""A number of tokens or parameters: 380B, 1e9, 3000000."""

Flops: TypeAlias = Annotated[
    int, BeforeValidator(_quantity("a number of FLOPs", "16G", FLOPS_UNITS)), _quantity_schema("16G", FLOPS_UNITS)
]
"""Floating-point operations: 16G, 1.2T."""

Bytes: TypeAlias = Annotated[
    int, BeforeValidator(_quantity("a size", "24GiB", BYTES_UNITS)), _quantity_schema("24GiB", BYTES_UNITS)
]
"""A size in memory or on disk: 24GiB, 64KiB."""


def _read_fraction(value: Any) -> float:
    hint = "write a share between 0% and 100%, such as 5%"
    try:
        number = float(Share.parse(value)) if isinstance(value, str) else value
    except ValueError as error:
        raise wrong(str(error), hint) from None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1:
        raise wrong("{given} is not a share", hint)
    return float(number)


PERCENT_PATTERN = rf"^{NUMBER_PATTERN}\s*%$"

Fraction: TypeAlias = Annotated[
    float,
    BeforeValidator(_read_fraction),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": PERCENT_PATTERN, "examples": ["5%"]},
            ]
        }
    ),
]
"""A share of something: 5%, or 0.05."""


def read_whole(value: Any) -> Any:
    """Reads `8K` and `1e3` as whole numbers, and leaves everything else to the check of the type."""
    number = None
    if isinstance(value, float):
        number = parse_exactly(repr(value), COUNT_UNITS)
    elif isinstance(value, str) and value.strip()[-1:] in COUNT_UNITS:
        number = parse_exactly(value, COUNT_UNITS)
    return value if number is None else number


def whole_choices(least: int, most: int) -> list[dict[str, Any]]:
    """Returns the JSON Schemas of a whole number: as a number, and as text with a unit."""
    text = {"type": "string", "pattern": rf"^{NUMBER_PATTERN}\s*({'|'.join(COUNT_UNITS)})$", "examples": ["8K"]}
    return [{"type": "integer", "minimum": least, "maximum": most}, text]


def _whole_schema(least: int, most: int) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": whole_choices(least, most)})


PositiveInt: TypeAlias = Annotated[int, BeforeValidator(read_whole), Field(ge=1, le=LARGEST), _whole_schema(1, LARGEST)]
NonNegativeInt: TypeAlias = Annotated[
    int, BeforeValidator(read_whole), Field(ge=0, le=LARGEST), _whole_schema(0, LARGEST)
]
SequenceLength: TypeAlias = Annotated[int, BeforeValidator(read_whole), Field(ge=2, le=2**31), _whole_schema(2, 2**31)]
LONGEST_SEQUENCE = 4096
"""Tokens of a sequence where the spec does not say: longer ones cost memory and attention, and few documents need them."""
EVALUATED_SEQUENCE = 2048
"""Tokens of a held-out sequence where nothing is trained, and so no length is said."""

PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0)]

# An empty name or path is never meant.
Text: TypeAlias = Annotated[str, Field(min_length=1)]

_REVISION = re.compile(r"[A-Za-z0-9][\w.+@=-]*(/[\w.+@=-]+)*", re.ASCII)


def _check_revision(value: str) -> str:
    """Accepts names that git allows for branches and tags, so that a revision cannot lead out of its folder."""
    if not _REVISION.fullmatch(value) or ".." in value:
        raise wrong("{given} is not a branch, tag or commit", "write a name such as main or v1.0, or a commit")
    return value


Revision: TypeAlias = Annotated[Text, AfterValidator(_check_revision)]
"""A branch, a tag or a commit."""


# --- widths ---

Target: TypeAlias = int | Share
"""One width: a number, or a share of the teacher's."""

_WIDTH_HINT = 'write a number such as 4096, or a share of the teacher such as "80%"'


def _read_target(value: Any) -> Target:
    if isinstance(value, Share):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= LARGEST:
            raise wrong(f"{value} is not a width", _WIDTH_HINT)
        return value
    if not isinstance(value, str):
        shown = "{given}" if not isinstance(value, int | float | YesNo) else f"`{getattr(value, 'text', value)}`"
        raise wrong(f"{shown} is not a width", _WIDTH_HINT)
    try:
        share = Share.parse(value)
    except ValueError:
        raise wrong(f"`{value}` is not a width", _WIDTH_HINT) from None
    if not 0 < share.of_one <= 1:
        raise wrong(f"`{value}` is not between 0% and 100%: a student has no more than its teacher", _WIDTH_HINT)
    return share


def read_list(value: list[T] | tuple[T, ...], read: Callable[[Any], Any], what: str) -> tuple[Any, ...]:
    """Reads a list of values that a search chooses from; `what` names one of them."""
    if not value:
        raise wrong("the list is empty", f"write the {what}s to try, or leave the key out")
    found = tuple(read(item) for item in value)
    if len(set(found)) < len(found):
        raise wrong(f"the list names a {what} twice", "keep one of them")
    return found


def read_span(
    value: Mapping[str, Any], read: Callable[[Any], Any], example: str, *, stepped: bool = False
) -> Span[Any]:
    """Reads `{min, max}`, with `stepped` also `step`, that a search chooses from."""
    known = ("min", "max", "step") if stepped else ("min", "max")
    for key in value:
        if key not in known:
            meant = did_you_mean(str(key), known)
            raise wrong(f"unknown key `{key}` of a range", f"{meant}write {example}")
    for key in ("min", "max"):
        if value.get(key) is None:
            raise wrong(f"the range has no `{key}`", f"write {example}")
    least, most, step = read(value["min"]), read(value["max"]), value.get("step")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= LARGEST):
        raise wrong("the range's `step` is not a whole number of at least 1", f"write {example}")
    if not isinstance(least, Share) and not isinstance(most, Share) and least > most:
        raise wrong(f"the range begins at {least:g} and ends at {most:g}", f"write {example}")
    if isinstance(least, Share) and isinstance(most, Share) and least.of_one > most.of_one:
        raise wrong(f"the range begins at {least} and ends at {most}", f"write {example}")
    return Span(least, most, step)


def _read_width(value: Any) -> Target | tuple[Target, ...] | Span[Target]:
    if isinstance(value, Span):
        return value
    if isinstance(value, Mapping):
        return read_span(value, _read_target, "{min: 1024, max: 4096, step: 256}", stepped=True)
    return read_list(value, _read_target, "width") if isinstance(value, list | tuple) else _read_target(value)


def _write_target(target: Target) -> int | str:
    return target if isinstance(target, int) else str(target)


def _write_width(width: Target | tuple[Target, ...] | Span[Target]) -> Any:
    if isinstance(width, tuple):
        return [_write_target(item) for item in width]
    if isinstance(width, Span):
        ends: dict[str, int | str] = {"min": _write_target(width.least), "max": _write_target(width.most)}
        return ends | ({} if width.step is None else {"step": width.step})
    return _write_target(width)


_TARGET_SCHEMA = [
    {"type": "integer", "minimum": 1},
    {"type": "string", "pattern": PERCENT_PATTERN, "examples": ["80%"]},
]


def choice_schema(one: list[dict[str, Any]], *, stepped: bool = False) -> WithJsonSchema:
    """The JSON Schema of a value, a list of values, or a range of them."""
    ends: dict[str, Any] = {"min": {"anyOf": one} if len(one) > 1 else one[0]}
    ends["max"] = ends["min"]
    step = {"step": {"type": "integer", "minimum": 1}} if stepped else {}
    span = {
        "type": "object",
        "properties": ends | step,
        "required": ["min", "max"],
        "additionalProperties": False,
    }
    several = {"type": "array", "minItems": 1, "items": ends["min"]}
    return WithJsonSchema({"anyOf": [*one, several, span]})


Width: TypeAlias = Annotated[
    Target | tuple[Target, ...] | Span[Target],
    PlainValidator(_read_width),
    PlainSerializer(_write_width),
    choice_schema(_TARGET_SCHEMA, stepped=True),
]
"""A width of the student; under `search` a list or a range of them."""


# --- a word, or something longer ---


WORD, LONGER = "<word>", "<longer>"
"""pydantic puts the name of a union's member into the place of an error; the translation takes these out again."""


def is_longer(value: Any) -> str:
    """Returns the discriminator of `word | mapping` and `word | list`: which of the two was written."""
    return WORD if isinstance(value, str) else LONGER


def word_or(hint: str, *words: str, also: type | tuple[type, ...]) -> BeforeValidator:
    """Refuses a value that is neither one of `words` nor an `also`, before the union is tried, with one message for
    both."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return value
        if isinstance(value, str | bool) or not isinstance(value, also):
            meant = did_you_mean(value, words) if isinstance(value, str) else ""
            raise wrong("{given} is not a valid value", f"{meant}write {hint}")
        return value

    return BeforeValidator(check)
