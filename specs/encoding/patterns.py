"""Analyses the regular expressions that tokenizers split text by, as far as a cut between two lines needs it.

Supported are alternatives of sequences of characters, character classes and groups, repeated or not, and a lookahead at
one character behind white space that treats all letters alike. For everything else (lookbehinds, anchors, references)
the answer is None.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache

import regex

_ANCHORS = "bBAzZGKXR"  # escapes that stand for no character
_MANY = 2  # repetitions from here on are all the same to us


class _NotUnderstood(Exception):
    pass


@dataclass(frozen=True)
class _Element:
    """A character class or a group, repeated `least` to `most` times, and which of the relevant characters it may
    contain."""

    line: bool
    letter: bool
    other: bool
    """Any printable ASCII character that is no white space."""

    joined: bool
    """True where a line break may be followed by a letter inside of it."""

    least: int
    most: int


@cache
def crosses(expression: str) -> bool | None:
    """Checks whether a match may contain a line break followed by an ASCII letter; None if that cannot be decided."""
    try:
        alternatives, end = _alternatives(expression, 0)
        return None if end != len(expression) else any(_joined(one) for one in alternatives)
    except (_NotUnderstood, IndexError, ValueError, regex.error):
        return None


@cache
def splits_line(expression: str) -> bool:
    """Checks whether a match always begins at a letter behind a line break: none crosses it, and every letter begins
    one."""
    if crosses(expression) is not False:
        return False
    compiled = regex.compile(expression)
    letters = [compiled.match(letter) for letter in string.ascii_letters]
    return all(found is not None and found.end() == 1 for found in letters)


def _alternatives(text: str, place: int) -> tuple[list[list[_Element]], int]:
    found: list[list[_Element]] = [[]]
    while place < len(text) and text[place] != ")":
        if text[place] == "|":
            found.append([])
            place += 1
            continue
        if text.startswith(("(?!", "(?="), place):
            if any(element.other or element.letter for element in found[-1]) or not found[-1]:
                raise _NotUnderstood
            ahead, place = _character(text, place + 3)
            if text[place] != ")" or len({ahead.fullmatch(one) is None for one in string.ascii_letters}) > 1:
                raise _NotUnderstood
            place += 1
            continue
        element, place = _element(text, place)
        found[-1].append(element)
    return found, place


def _element(text: str, place: int) -> tuple[_Element, int]:
    if text[place] == "(":
        inner, place = _group(text, place)
        flat = [element for one in inner for element in one]
        line, letter, other = (any(getattr(one, name) for one in flat) for name in ("line", "letter", "other"))
        joined = any(_joined(one) for one in inner)
        empty = any(all(not element.least for element in one) for one in inner)
    else:
        pattern, place = _character(text, place)
        line = pattern.fullmatch("\n") is not None
        letter = any(pattern.fullmatch(one) for one in string.ascii_letters)
        other = any(pattern.fullmatch(one) for one in string.digits + string.punctuation)
        joined = empty = False
    least, most, place = _repetition(text, place)
    joined = joined or (line and letter and most >= _MANY)
    return _Element(line, letter, other, joined, 0 if empty else least, most), place


def _group(text: str, place: int) -> tuple[list[list[_Element]], int]:
    start = regex.compile(r"\((\?i?:|\?i\)|(?!\?))").match(text, place)
    if start is None or start[0].endswith("i)"):
        raise _NotUnderstood
    inner, place = _alternatives(text, start.end())
    if text[place] != ")":
        raise _NotUnderstood
    return inner, place + 1


def _character(text: str, place: int) -> tuple[regex.Pattern[str], int]:
    """Returns the pattern of one character."""
    if text[place] == "[":
        end = place + 1
        while text[end] != "]" or end == place + 1 or text[place + 1 : end] == "^":
            if text[end] == "[" or text.startswith(("&&", "--", "||", "~~"), end):
                raise _NotUnderstood
            end += 2 if text[end] == "\\" else 1
        end += 1
    elif text[place] == "\\":
        if text[place + 1] in _ANCHORS + string.digits:
            raise _NotUnderstood
        end = text.index("}", place) + 1 if text[place + 1] in "pPx" and text[place + 2] == "{" else place + 2
        if text[place + 1] in "xuUc" and text[place + 2] != "{":
            raise _NotUnderstood
    elif text[place] in "^$*+?{(":
        raise _NotUnderstood
    else:
        end = place + 1
    return regex.compile(text[place:end]), end


def _repetition(text: str, place: int) -> tuple[int, int, int]:
    """Returns (least, most, place behind it) of the element that was just read."""
    found = regex.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})[?+]?").match(text, place)
    if found is None:
        return 1, 1, place
    match found[1]:
        case "*":
            return 0, _MANY, found.end()
        case "+":
            return 1, _MANY, found.end()
        case "?":
            return 0, 1, found.end()
        case _:
            least = int(found[2] or 0)
            most = least if not found[3] else int(found[4] or _MANY)
            return least, most, found.end()


def _joined(elements: list[_Element]) -> bool:
    """Checks whether a sequence may contain a line break followed by a letter."""
    for index, element in enumerate(elements):
        if element.joined:
            return True
        if element.line:
            for after in elements[index + 1 :]:
                if after.letter:
                    return True
                if after.least:
                    break
    return False
