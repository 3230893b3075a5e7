"""Reads YAML with the place of every key and value.

The tree is built from the parser's events by a loop of minitron's own rather than by PyYAML's constructors. That gives
places, duplicate keys and several errors at once; it reads `1e-4` as a number and `off` as neither a boolean nor a
string; and no input hangs the loop or exhausts the stack, because the expanded size of an alias is known before
anything is expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from minitron.specs.errors import SpecError, SpecInvalid
from minitron.specs.units import NUMBER_PATTERN

# A spec has some hundred values. These limits only stop what cannot be a spec.
MAX_VALUES = 20_000
MAX_DEPTH = 40
MAX_BYTES = 2**20

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, ten times faster, wherever PyYAML was built with it

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(NUMBER_PATTERN + r"|[+-]?\.[0-9]+(?:[eE][+-]?[0-9]+)?|[+-]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONSTANTS: dict[str, bool | None] = {"": None, "~": None, "true": True, "false": False} | dict.fromkeys(
    ("null", "Null", "NULL")
)
_CONSTANTS |= {"True": True, "TRUE": True, "False": False, "FALSE": False}
# A key whose colon YAML does not read as one: without a space behind it, with a space that is none of YAML's, or another colon.
_GLUED = re.compile(r"([ ]*(?:- +)?)([A-Za-z_][\w.-]*) *(?::(?=[^ \n\t/])|\uff1a)(.+)")
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class YesNo:
    """A bare `yes`, `no`, `on` or `off`: a boolean to some YAML readers, a string to others, and neither here."""

    text: str


_YES_NO = {spelling for word in ("yes", "no", "on", "off") for spelling in (word, word.capitalize(), word.upper())}

ScalarValue: TypeAlias = str | int | float | bool | YesNo | None


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a value in a file. Line and column count from 1; line 0 means all of `file`, as for a `--set`."""

    file: str
    line: int
    column: int

    def error(self, path: str, message: str, hint: str = "") -> SpecError:
        """Returns an error at this place."""
        return SpecError(self.file, self.line, self.column, path, message, hint)


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. `text` is the user's spelling, `value` its meaning."""

    place: Place
    text: str
    value: ScalarValue
    size: int = 1
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list. `size` counts the values in it with every alias written out, `depth` its levels."""

    place: Place
    items: list[Node] = field(default_factory=list)
    size: int = 1
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` of a mapping; `place` is the key's."""

    place: Place
    node: Node


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping; merge keys (`<<`) are already merged."""

    place: Place
    entries: dict[str, Entry] = field(default_factory=dict)
    size: int = 1
    depth: int = 1


Node: TypeAlias = Scalar | Sequence | Mapping
Plain: TypeAlias = ScalarValue | list["Plain"] | dict[str, "Plain"]


def node_at(node: Node | None, *path: str) -> Node | None:
    """Returns the node under a path of keys; None where nothing is written there."""
    for key in path:
        if not isinstance(node, Mapping) or key not in node.entries:
            return None
        node = node.entries[key].node
    return node


def plain(node: Node) -> Plain:
    """Returns the tree as dicts, lists and scalars, without places."""
    match node:
        case Scalar():
            return node.value
        case Sequence():
            return [plain(item) for item in node.items]
        case Mapping():
            return {key: plain(entry.node) for key, entry in node.entries.items()}


def scalar_value(text: str) -> ScalarValue:
    """Returns the value of an unquoted scalar by the YAML 1.2 core schema, with `1e-4` and `1_000` as numbers."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text in _YES_NO:
        return YesNo(text)
    if len(text) < 100:  # no number of a spec is longer, and int() takes quadratic time
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""), 0)
        # A leading zero is octal to some readers and decimal to others: it stays text, which no number field takes.
        if _FLOAT.fullmatch(text) and not re.match(r"[+-]?0[0-9]", text):
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text


def read_bytes(content: bytes, file: str) -> tuple[Node, list[SpecError]]:
    """Parses a file's bytes; otherwise as `read_text`."""
    if len(content) > MAX_BYTES:
        raise SpecInvalid([SpecError(file, 0, 0, "", f"is {len(content)} bytes long, more than a spec can be")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", errors="replace")
        found = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise SpecInvalid([_place_after(before, file).error("", found, "save the file as UTF-8")]) from None
    return read_text(text, file)


def read_text(text: str, file: str) -> tuple[Node, list[SpecError]]:
    """Returns the tree of a YAML text, and the mistakes that still leave a tree (a duplicate key). SpecInvalid for
    others."""
    if bad := _UNREADABLE.search(text):
        place = _place_after(text[: bad.start()], file)
        raise SpecInvalid([place.error("", f"unreadable character U+{ord(bad.group()):04X}", "delete it")])
    builder = _Builder(file)
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise SpecInvalid([*builder.errors, _syntax_error(error, text, file)]) from None
    return builder.root or Scalar(Place(file, 1, 1), "", None), builder.errors


def _place_after(text: str, file: str) -> Place:
    lines = text.split("\n")
    return Place(file, len(lines), len(lines[-1]) + 1)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str) -> SpecError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    place = Place(file, line + 1, column + 1)
    lines = text.split("\n")
    shown = lines[line] if line < len(lines) else ""
    if "\t" in shown[: column + 1] and not shown[: column + 1].strip():
        return place.error("", "a tab indents this line", "write spaces: YAML allows no tabs there")
    if "mapping values" in str(error.problem):
        if re.search(r":\s+\S", shown[:column]):
            return place.error("", "a second colon stands in this value", "write the value in quotes")
        # What is no key to YAML is the beginning of a text, and the next key then stands in its middle.
        for number in range(line - 1, -1, -1):
            if glued := _GLUED.match(lines[number]):
                message = f"no space stands behind the colon of `{glued[2]}`"
                at = Place(file, number + 1, len(glued[1]) + 1)
                return at.error("", message, f"write `{glued[2]}: {glued[3].strip()}`")
            if lines[number].strip():
                break
    opened = f" (in what begins at line {error.context_mark.line + 1})" if error.context_mark else ""
    return place.error(
        "",
        f"not valid YAML: {error.problem or 'cannot be read'}{opened}",
        "look at the indentation, the quotes and the brackets here",
    )


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet; in a mapping keys and values alternate in `children`."""

    place: Place
    anchor: str | None
    is_mapping: bool
    children: list[Node] = field(default_factory=list)


class _Builder:
    """Takes parser events in order and builds the tree, without recursion."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.errors: list[SpecError] = []
        self.root: Node | None = None
        self.stack: list[_Open] = []
        self.anchors: dict[str, Node] = {}

    def take(self, event: yaml.Event) -> None:
        assert event.start_mark is not None, "events of a parser have marks"
        place = Place(self.file, event.start_mark.line + 1, event.start_mark.column + 1)
        match event:
            case yaml.AliasEvent():
                self._add(self._aliased(str(event.anchor), place), None)
            case yaml.ScalarEvent():
                self._refuse_tag(event, place)
                if "\0" in event.value:
                    raise self._stopped(place, "the character U+0000 stands here", "delete it")
                value = scalar_value(event.value) if event.implicit[0] else event.value
                self._add(Scalar(place, event.value, value), event.anchor)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._refuse_tag(event, place)
                if len(self.stack) >= MAX_DEPTH:
                    raise self._stopped(place, "is nested too deeply to be a spec")
                self.stack.append(_Open(place, event.anchor, isinstance(event, yaml.MappingStartEvent)))
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                done = self.stack.pop()
                self._add(self._mapping(done) if done.is_mapping else self._sequence(done), done.anchor)
            case yaml.DocumentStartEvent() if self.root is not None:
                raise self._stopped(place, "a second document begins here", "keep one spec in a file")
            case _:
                pass

    def _stopped(self, place: Place, message: str, hint: str = "") -> SpecInvalid:
        return SpecInvalid([*self.errors, place.error("", message, hint)])

    def _add(self, node: Node, anchor: str | None) -> None:
        if node.size > MAX_VALUES or node.depth > MAX_DEPTH + 1:  # the innermost values are one level more
            raise self._stopped(node.place, "its aliases expand to more than a spec can hold", "write the values out")
        if anchor is not None:
            self.anchors[anchor] = node
        if self.stack:
            self.stack[-1].children.append(node)
        else:
            self.root = node

    def _refuse_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, place: Place) -> None:
        if event.tag not in (None, "!"):
            self.errors.append(
                place.error("", f"the tag `{event.tag}` is not part of the spec language", "leave it out")
            )

    def _aliased(self, name: str, place: Place) -> Node:
        if name in self.anchors and not any(frame.anchor == name for frame in self.stack):
            return self.anchors[name]
        known = any(frame.anchor == name for frame in self.stack)
        message = f"`*{name}` stands inside what it names" if known else f"`*{name}` names no anchor before it"
        raise self._stopped(place, message, f"put `&{name}` on an earlier value that is complete")

    def _sequence(self, frame: _Open) -> Sequence:
        return Sequence(frame.place, frame.children, *_measure(frame.children))

    def _mapping(self, frame: _Open) -> Mapping:
        entries: dict[str, Entry] = {}
        merged: list[Mapping] = []
        for key, value in zip(frame.children[::2], frame.children[1::2], strict=True):
            if not isinstance(key, Scalar):
                self.errors.append(key.place.error("", "a key must be a word", "write `key: value`"))
            elif key.text == "<<":
                merged += self._merged(value)
            elif key.text in entries:
                first = entries[key.text].place.line
                message = f"the key `{key.text}` stands twice, first at line {first}"
                self.errors.append(key.place.error("", message, "keep one of them"))
            else:
                entries[key.text] = Entry(key.place, value)
        for source in merged:
            entries = entries | {name: entry for name, entry in source.entries.items() if name not in entries}
        return Mapping(frame.place, entries, *_measure(entry.node for entry in entries.values()))

    def _merged(self, value: Node) -> list[Mapping]:
        sources = value.items if isinstance(value, Sequence) else [value]
        mappings = [source for source in sources if isinstance(source, Mapping)]
        if len(mappings) < len(sources):
            self.errors.append(value.place.error("", "`<<` merges mappings only", "write `<<: *name` of a mapping"))
        return mappings


def _measure(children: Iterator[Node] | list[Node]) -> tuple[int, int]:
    size, depth = 1, 0
    for child in children:
        size, depth = size + child.size, max(depth, child.depth)
    return size, depth + 1
