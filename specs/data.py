"""The block `data`: the sources of documents. The same model is used in the spec and in training.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from minitron.specs.blocks.base import Block, Count, Fraction, Listed, PositiveFloat, Revision, Text, wrong
from minitron.specs.suggest import closest, one_of

STDLIB_PREFIX = "python-stdlib:"
STDLIB_SPLITS = ("train", "held_out")

MOST_PASSES = 4
"""Passes over the data that are worth nearly as much as new text (arXiv 2305.16264)."""

# Which options go with which kind of source, and the defaults that are then filled in.
_CONTENTS = ("text_field", "messages_field", "prompt_field", "ids_field")
_EVERY = ("on_error", "only", "leave_out")
_ROWS = (*_CONTENTS, "completion_field", "tools_field", "system", "train_on", *_EVERY)
_KINDS: Mapping[str, tuple[str, ...]] = {
    "text": ("document", *_EVERY),
    "jsonl": _ROWS,
    "parquet": _ROWS,
    "dataset": (*_ROWS, "subset", "split", "revision", "streaming"),
    "megatron": (),
    "blend": (),
}
_DEFAULTS = {
    "document": "file",
    "text_field": "text",
    "completion_field": "completion",
    "train_on": "all",
    "split": "train",
    "streaming": False,
    "on_error": "fail",
}
_OPTIONS = sorted({option for options in _KINDS.values() for option in options})
# Options that do not decide what the documents of a file are.
_NOT_THE_DOCUMENTS = {"only", "leave_out", "on_error", "streaming", "train_on"}
# Which of the row options go with what a row holds; `on_error` goes with all of them.
_BELONGS: Mapping[str, tuple[str, ...]] = {
    "completion_field": ("prompt_field",),
    "tools_field": ("messages_field",),
    "train_on": ("messages_field", "prompt_field"),
    "system": ("messages_field", "prompt_field"),
}


def _check_pattern(pattern: str) -> str:
    split = pattern.removeprefix(STDLIB_PREFIX)
    if split != pattern and split not in STDLIB_SPLITS:
        meant = closest(split, STDLIB_SPLITS)
        hint = f"did you mean `{STDLIB_PREFIX}{meant}`?" if meant else f"write {STDLIB_PREFIX}{one_of(STDLIB_SPLITS)}"
        raise wrong(f"the standard library has no part `{split}`", hint)
    return pattern


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_PATTERN_SCHEMA = {"type": "string", "minLength": 1}

Patterns: TypeAlias = Annotated[
    Listed[Annotated[Text, BeforeValidator(lambda value: _check_pattern(value) if isinstance(value, str) else value)]],
    BeforeValidator(_one_or_many),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_PATTERN_SCHEMA, {"type": "array", "minItems": 1, "items": _PATTERN_SCHEMA}]}),
]
"""One file or pattern, or a list of them."""


def _say_one_kind(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Tells editors that exactly one kind of source is given."""
    kinds = [kind for kind in (*_KINDS, "fraction") if kind in model.model_fields]
    schema["oneOf"] = [{"required": [kind], "properties": {kind: {"not": {"type": "null"}}}} for kind in kinds]


class Source(Block, json_schema_extra=_say_one_kind):
    """One source of documents: `text`, `jsonl`, `parquet`, `dataset` or `megatron`."""

    text: Patterns | None = None
    """Text files or patterns (`corpus/**/*.txt`), relative to this file; or `python-stdlib:train` and
    `python-stdlib:held_out`: the source of the running Python's standard library. Also compressed: .gz, .bz2, .xz, .zst."""

    jsonl: Patterns | None = None
    """Files or patterns of JSON Lines, one document a line, or of JSON arrays, one document an element; relative to this
    file, also compressed: .gz, .bz2, .xz, .zst."""

    parquet: Patterns | None = None
    """Parquet files or patterns, one document a row, relative to this file."""

    dataset: Text | None = None
    """A data set of the Hugging Face Hub by id, or a folder relative to this file."""

    megatron: Patterns | None = None
    """Tokens of Megatron-LM: `.bin` files or patterns, each with its `.idx` beside it; read as they are."""

    document: Literal["file", "line", "paragraph"] | None = None
    """With `text`: what one document is. `file`: a whole file; `line`: each line that is not empty; `paragraph`: what
    stands between blank lines. Left out: `file`."""

    text_field: Text | None = None
    """With `jsonl`, `parquet` and `dataset`: the field that holds the text; `content.body` is a field inside a field. Left
    out: `text`."""

    messages_field: Text | None = None
    """Instead of `text_field`: the field that holds chat messages, rendered with the tokenizer's chat template."""

    prompt_field: Text | None = None
    """Instead of `text_field`: the field that holds a prompt, whose answer is in `completion_field`. With a chat template they
    are rendered as a user's and an assistant's message, without one they follow each other."""

    completion_field: Text | None = None
    """With `prompt_field`: the field that holds the answer. Left out: `completion`."""

    ids_field: Text | None = None
    """Instead of `text_field`: the field that holds token ids, which are read as they are."""

    tools_field: Text | None = None
    """With `messages_field`: the field that holds the tools which the chat template is told of; rows may lack it."""

    system: Text | None = None
    """With `messages_field` and `prompt_field`: the system message of conversations that begin with none."""

    train_on: Literal["assistant", "all"] | None = None
    """With `messages_field` and `prompt_field`: the loss is taken on the assistant's tokens alone, or on `all`. Left out:
    `all`."""

    on_error: Literal["fail", "skip"] | None = None
    """A document that cannot be read: `fail` ends the command, `skip` leaves the document out and counts it. Left out:
    `fail`."""

    subset: Text | None = None
    """With `dataset`: its configuration, for data sets that have several."""

    split: Text | None = None
    """With `dataset`: its split. Left out: `train`."""

    revision: Revision | None = None
    """With `dataset`: branch, tag or commit. Left out: the main branch. A compile takes the commit that it is at, and its build
    stays with it; the lock file pins the commit."""

    streaming: bool | None = None
    """With `dataset`: read over the network as it goes instead of downloading first. Left out: false."""

    only: Fraction | None = None
    """This share of the documents alone, chosen by a hash of their text: the same whatever stands beside them."""

    leave_out: Fraction | None = None
    """All documents but this share of them: those that `only` would choose."""

    @property
    def kind(self) -> str:
        """Returns the key of the one kind of source that is given."""
        return next(kind for kind in _KINDS if getattr(self, kind, None) is not None)

    @property
    def share(self) -> float:
        """Returns the share of a blend that comes from this source, in proportion to the others'; 1 for a source alone."""
        return 1.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        """Fills in the defaults that go with the kind; the later validators report wrong values."""
        if not isinstance(value, dict):
            return value
        kinds = [kind for kind in _KINDS if value.get(kind) is not None]
        options = _KINDS[kinds[0]] if len(kinds) == 1 else ()
        given = {key: item for key, item in value.items() if item is not None}
        defaults = {option: _DEFAULTS[option] for option in options if option in _DEFAULTS and option not in given}
        contents = next((key for key in _CONTENTS if key in given), "text_field")
        if contents != "text_field":
            defaults.pop("text_field", None)
        return given | {key: item for key, item in defaults.items() if contents in _BELONGS.get(key, (contents,))}

    @model_validator(mode="after")
    def _check(self) -> Source:
        kinds = [kind for kind in _KINDS if getattr(self, kind, None) is not None]
        possible = [kind for kind in _KINDS if kind in type(self).model_fields]
        if getattr(self, "fraction", None) is not None:
            given = [key for key in (*kinds, *_OPTIONS) if getattr(self, key) is not None]
            if given:
                raise wrong(f"says both `fraction` and `{given[0]}`", "keep one: `fraction` is of `distill.data`")
            return self
        if not kinds:
            raise wrong("says no source of documents", f"write one of {one_of(possible)}")
        if len(kinds) > 1:
            several = "keep one of them, or set the one of the base spec to null; `blend` mixes several sources"
            raise wrong(f"says {' and '.join(f'`{kind}`' for kind in kinds)}: a source is one of these", several)
        for option in _OPTIONS:
            if getattr(self, option) is not None and option not in _KINDS[kinds[0]]:
                fitting = one_of([f"`{kind}`" for kind in possible if option in _KINDS[kind]])
                raise wrong(f"`{option}` goes with {fitting}, not with `{kinds[0]}`", "leave it out")
        contents = [option for option in _CONTENTS if getattr(self, option) is not None]
        if len(contents) > 1:
            raise wrong(f"says both `{contents[0]}` and `{contents[1]}`", "keep one of them")
        for option, fitting_contents in _BELONGS.items():
            if getattr(self, option) is not None and not set(contents) & set(fitting_contents):
                fitting = one_of([f"`{name}`" for name in fitting_contents])
                raise wrong(f"`{option}` goes with {fitting}", f"add {fitting}, or leave it out")
        return self

    @model_serializer(mode="wrap")
    def _only_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serializes the source without the keys of other kinds."""
        return {key: value for key, value in write(self).items() if value is not None}


class BlendPart(Source):
    """One source of a blend."""

    weight: PositiveFloat | None = None
    """Share of the text that comes from this source, in proportion to the other weights."""

    tokens: Count | None = None
    """Instead of `weight`: the number of tokens of the training that come from this source."""

    @property
    def share(self) -> float:
        """Returns the part's weight, or its tokens, which is proportional to its share of the blend."""
        return float(self.weight if self.weight is not None else self.tokens or 0)

    @model_validator(mode="after")
    def _one_measure(self) -> BlendPart:
        if (self.weight is None) == (self.tokens is None):
            said = "says neither `weight` nor `tokens`" if self.weight is None else "says both `weight` and `tokens`"
            raise wrong(f"{said}: how much comes from this source", "write one of them")
        return self


class DataSource(Source):
    """A source of documents: exactly one of `text`, `jsonl`, `parquet`, `dataset`, `megatron` and `blend`."""

    blend: Annotated[Listed[BlendPart], Field(min_length=1)] | None = None
    """Several sources, mixed by weight: `[{weight: 0.7, text: [...]}, {weight: 0.3, jsonl: [...]}]`; or by `tokens`, each
    part its budget."""

    @model_validator(mode="after")
    def _one_measure_for_all(self) -> DataSource:
        if self.blend is not None and len({part.weight is None for part in self.blend}) > 1:
            raise wrong("mixes parts by `weight` with parts by `tokens`", "write one of the two for every part")
        return self


class HeldOutSource(DataSource):
    """A source of held-out documents: one of the kinds of `distill.data`, or `fraction`."""

    fraction: Fraction | None = None
    """This share of the documents of `distill.data`, chosen by a hash of their text; training leaves them out."""


def are_apart(one: Source, other: Source) -> bool:
    """Checks whether two sources share no document whatever files they read: one has only a share that the other, which reads
    them in the same way, leaves out."""
    if any(getattr(one, key) != getattr(other, key) for key in _OPTIONS if key not in _NOT_THE_DOCUMENTS):
        return False
    return any(
        kept.only is not None and rest.leave_out is not None and kept.only <= rest.leave_out
        for kept, rest in ((one, other), (other, one))
    )


def divided(source: DataSource, **share: float) -> DataSource:
    """Returns the source with `only` or `leave_out` set on it, or on each part of a blend."""
    if source.blend is None:
        return source.model_copy(update=share)
    return source.model_copy(update={"blend": tuple(part.model_copy(update=share) for part in source.blend)})
