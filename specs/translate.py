"""Translates pydantic's errors into the words of the language: what was given, what is wanted, what to write.

The translation knows only the model that it is given, and so serves training.yaml as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from minitron.specs import shape
from minitron.specs.blocks.base import LONGER, WORD, Block
from minitron.specs.errors import SpecError
from minitron.specs.one_line import one_line
from minitron.specs.shape import Path, dotted, from_dotted
from minitron.specs.source import Mapping, Node, Place, Scalar, Sequence, YesNo
from minitron.specs.suggest import closest, one_of


@dataclass(frozen=True, slots=True)
class Found:
    """The path of a fault, and the error to show; None if the fault only follows from another one."""

    path: Path
    error: SpecError | None


@dataclass(frozen=True, slots=True)
class _Case:
    """One error of pydantic and what the file says at its path."""

    model: type[Block]
    path: Path
    node: Node | None
    value: Any
    context: AbstractMapping[str, Any]

    @property
    def given(self) -> str:
        match self.node:
            case Mapping():
                return "a mapping"
            case Sequence():
                return "a list"
            case Scalar(value=None, text=""):
                return "nothing"
            case Scalar(text=text):
                return f"`{textwrap.shorten(one_line(text), 60, placeholder=' ...')}`"
            case None:
                return f"`{self.value}`"


def locate(root: Node, path: Path) -> tuple[Place, Node | None]:
    """Returns the place and node of `path`; if it does not exist, the place of its nearest parent and no node.

    A scalar has its own place; a mapping or list has the place of its key, where a reader looks for it.
    """
    place, node = root.place, root
    for part in path:
        if isinstance(node, Mapping) and part in node.entries:
            entry = node.entries[str(part)]
            node = entry.node
            place = node.place if isinstance(node, Scalar) else entry.place
        elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
            place = node.place
        else:
            return place, None
    return place, node


@dataclass(frozen=True, slots=True)
class Places:
    """The places of a file's values, by dotted path."""

    tree: Node

    def error(self, path: str, message: str, hint: str = "") -> SpecError:
        """Returns an error at the place of the dotted `path`, or of its nearest parent if only a default stands there."""
        return locate(self.tree, from_dotted(path))[0].error(path, message, hint)


def translate(details: list[ErrorDetails], root: Node, model: type[Block]) -> list[Found]:
    """Returns every error that pydantic found when it read the tree `root` as a `model`, at its place."""
    paths = [_path(detail, root) for detail in details]
    unknown = [path for path, detail in zip(paths, details, strict=True) if detail["type"] == "extra_forbidden"]
    meant = {(*path[:-1], _nearest_key(model, path)) for path in unknown}
    found = []
    for path, detail in zip(paths, details, strict=True):
        misspelled = detail["type"] == "missing" and path in meant
        # pydantic counts only the items of a list that hold.
        uncounted = detail["type"] == "too_short" and any(path == other[: len(path)] != other for other in paths)
        if misspelled or uncounted:
            found.append(Found(path, None))
            continue
        place, node = locate(root, path)
        if detail["type"] == "extra_forbidden":
            place = _key_place(root, path)
        case = _Case(model, path, node, detail["input"], detail.get("ctx", {}))
        message, hint = _WORDS.get(detail["type"], _anything_else)(case)
        if isinstance(node, Scalar) and node.value is None and node.text == "" and detail["type"] != "extra_forbidden":
            message = "nothing is written here"
        found.append(Found(path, place.error(dotted(path), message, hint)))
    return found


def _path(detail: ErrorDetails, root: Node) -> Path:
    """Returns pydantic's location without the names of union members, and without an index into a value that is not a list."""
    loc = detail["loc"]
    # An unknown key is the user's own word, whatever it is.
    own = len(loc) - 1 if detail["type"] == "extra_forbidden" else None
    path = tuple(part for index, part in enumerate(loc) if index == own or part not in (WORD, LONGER))
    while path and isinstance(path[-1], int) and isinstance(locate(root, path[:-1])[1], Scalar):
        path = path[:-1]
    return path


def _key_place(root: Node, path: Path) -> Place:
    parent = locate(root, path[:-1])[1]
    assert isinstance(parent, Mapping), "an unknown key stands in a mapping"
    return parent.entries[str(path[-1])].place


def _keys_at(model: type[Block], path: Path) -> list[str]:
    return [key for block in shape.blocks_at(model, path) for key in block.model_fields]


def _nearest_key(model: type[Block], path: Path) -> str:
    return closest(str(path[-1]), _keys_at(model, path[:-1])) or ""


# --- one function for each error of pydantic ---

Words = tuple[str, str]

# Keys that people write because other tools have them; the answer is more than "unknown".
_NOT_HERE: AbstractMapping[Path, Words] = {
    ("student", "vocab_size"): (
        "the vocabulary is never changed",
        "leave it out: the student reads the teacher's tokens",
    ),
    ("recovery", "blocks"): (
        "block-local distillation is not offered: at equal tokens it gave no more than hidden states that are aligned in kept "
        "coordinates, which need no phase of their own (docs/method.md)",
        "leave it out, and write `hidden_states: {coordinates: kept}` under `distill.loss`",
    ),
    ("extends",): ("`extends` stands at the top of a spec file only", "move it there"),
}


def _unknown_key(case: _Case) -> Words:
    if case.path in _NOT_HERE:
        return _NOT_HERE[case.path]
    key = str(case.path[-1])
    *above, last = key.split(".")
    if above and (inner := _keys_at(case.model, (*case.path[:-1], *above))):
        nest = ": {".join((*above, closest(last, inner) or last)) + ": ..." + "}" * key.count(".")
        return f"unknown key `{key}`", f"keys are nested: write `{nest}` (dots stand in `--set` alone)"
    if nearest := _nearest_key(case.model, case.path):
        return f"unknown key `{key}`", f"did you mean `{nearest}`?{_foreign(key, nearest)}"
    if homes := [home for home in shape.homes(case.model).get(key, []) if home]:
        return f"unknown key `{key}`", f"it belongs under {one_of(list(dict.fromkeys(f'`{home}`' for home in homes)))}"
    keys = _keys_at(case.model, case.path[:-1])
    return f"unknown key `{key}`", f"write one of {one_of(keys)}, or leave it out"


def _foreign(key: str, meant: str) -> str:
    """Names a letter of another alphabet in a key that looks like the one that is meant."""
    other = next(
        (letter for letter in key if letter.isprintable() and not letter.isascii() and letter not in meant), None
    )
    return "" if other is None else f" (the `{other}` in it is U+{ord(other):04X}, a letter of another alphabet)"


def _missing(case: _Case) -> Words:
    key = case.path[-1]
    if isinstance(key, int):
        return "the list is too short", "write two values"
    fields = [
        block.model_fields[key] for block in shape.blocks_at(case.model, case.path[:-1]) if key in block.model_fields
    ]
    what = (fields[0].description or "").split("\n")[0].rstrip(".") if fields else ""
    return f"`{key}` is missing", f"add `{key}:` ({what[:1].lower()}{what[1:]})"


def _wants_word(case: _Case) -> Words:
    words = shape.words_at(case.model, case.path)
    nearest = closest(case.node.text, words) if isinstance(case.node, Scalar) else None
    if nearest and len(words) > 1:
        return f"{case.given} is not a valid value", f"did you mean `{nearest}`? possible are {one_of(words)}"
    return f"{case.given} is not a valid value", f"write {one_of(words)}"


def _wants_text(case: _Case) -> Words:
    match case.node:
        case Scalar(value=YesNo()):
            return (
                f"{case.given} is a truth value to some YAML readers",
                f'write "{case.node.text}" in quotes',
            )
        case Scalar(value=None):
            return f"{case.given} is written here, and text is wanted", "write a text, or leave the key out"
        case Scalar():
            kind = "a truth value" if isinstance(case.value, bool) else "a number"
            return f"{case.given} is {kind}, and text is wanted", f'write "{case.node.text}" in quotes'
        case _:
            return f"{case.given} stands here, and text is wanted", "write one text"


def _wants_truth(case: _Case) -> Words:
    if isinstance(case.value, YesNo):
        meant = "true" if case.value.text.lower() in ("yes", "on") else "false"
        return f"{case.given} is neither true nor false", f"write {meant}"
    return f"{case.given} is neither true nor false", "write true or false"


def _wants_number(kind: str) -> Callable[[_Case], Words]:
    def words(case: _Case) -> Words:
        if isinstance(case.value, str):
            try:
                float(case.value)
            except ValueError:
                return f"{case.given} is not {kind}", f"write {kind}"
            return f'"{case.value}" is text, and {kind} is wanted', f"write {case.value} without quotes"
        return f"{case.given} is not {kind}", f"write {kind}"

    return words


def _bound(key: str, words: str) -> Callable[[_Case], Words]:
    def bound(case: _Case) -> Words:
        limit = case.context[key]
        shown = f"{limit:.0f}" if isinstance(limit, float) and limit.is_integer() else f"{limit}"
        return f"{case.given} is out of range", f"write a number {words} {shown}"

    return bound


def _wants_list(case: _Case) -> Words:
    return f"{case.given} stands here, and a list is wanted", "write [first, second]"


def _wants_mapping(case: _Case) -> Words:
    keys = _keys_at(case.model, case.path)
    from_these = f" with keys from {one_of(keys)}" if keys else ""
    return f"{case.given} stands here, and a mapping is wanted", f"write `key: value`{from_these}"


def _too_short(case: _Case) -> Words:
    return "the list is empty", "write what it shall hold, or leave the key out"


def _too_long(case: _Case) -> Words:
    limit = case.context["max_length"]
    return f"the list has {case.context['actual_length']} values", f"write {limit}"


def _ours(case: _Case) -> Words:
    return case.context["message"].replace("{given}", case.given), case.context["hint"]


def _anything_else(case: _Case) -> Words:
    return f"{case.given} is not a valid value", "the spec reference says what may stand here"


_WORDS: AbstractMapping[str, Callable[[_Case], Words]] = {
    "minitron": _ours,
    "extra_forbidden": _unknown_key,
    "missing": _missing,
    "literal_error": _wants_word,
    "string_type": _wants_text,
    "string_too_short": lambda case: ("an empty text stands here", "write a text, or leave the key out"),
    "bool_type": _wants_truth,
    "int_type": _wants_number("a whole number"),
    "float_type": _wants_number("a number"),
    "finite_number": _wants_number("a finite number"),
    "greater_than": _bound("gt", "greater than"),
    "greater_than_equal": _bound("ge", "of at least"),
    "less_than": _bound("lt", "less than"),
    "less_than_equal": _bound("le", "of at most"),
    "tuple_type": _wants_list,
    "too_short": _too_short,
    "too_long": _too_long,
    "model_type": _wants_mapping,
    "dict_type": _wants_mapping,
}
