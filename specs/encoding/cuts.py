"""Decides whether a text may be cut between two lines without changing its tokens.

The cut is the one of `specs.documents.opening`: behind a line break, before an ASCII letter. The first half is encoded with a
letter behind it, whose tokens are taken off again (`CutRule.tail`). The cut changes nothing where each stage of a tokenizer
does the same to both halves as to the whole:

1. Added tokens: none contains a line break that is followed by a letter, and none that begins with a letter strips what is on
   its left. The search for them then finds the same on both sides.
2. Normalizer: changes single characters, or composes them; nothing composes a line break with a letter. Text that is put in
   front of the whole (`▁`) is put in front of the second half too, and taken off again: see `CutRule.context`.
3. Pre-tokenizer: every stage splits by single characters, or by a regular expression of which no match holds a line break that
   is followed by a letter. No match and no attempt at one passes the cut, so the matches before it follow from the text before
   it and, where the expression looks ahead, from the one character behind it, which is a letter in both cases.
4. Model: either the pre-tokenizer ends a word there, or it is a BPE of whose tokens none holds a line break that is followed by
   a letter: then no merge crosses the cut, and merges on one side do not depend on the other.

What is not recognised is not cut.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minitron.specs.encoding.patterns import crosses, splits_line

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The expression that `ByteLevel` splits by (Radford et al. 2019, the encoder published with GPT-2)."""

_LINE_THEN_LETTER = re.compile("[\nĊ][A-Za-z]")
"""A line break and a letter in the model's vocabulary; byte-level alphabets write a line break as Ċ."""

TAIL = "a"
"""Stands for the letter that the next part begins with."""

_CHARACTERWISE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


@dataclass(frozen=True)
class CutRule:
    """The encoding of the parts of a cut text: a part with text before it is encoded behind `context`, a part with text
    after it is encoded in front of TAIL; the tokens of both are removed again."""

    context: str
    tokens: tuple[int, ...]
    tail: tuple[int, ...]


def cut_rule(tokenizer: Any) -> CutRule | None:
    """Returns the rule of a tokenizer of the `tokenizers` library; None if its texts must stay whole."""
    document = json.loads(tokenizer.to_str())
    if not (_added(document) and _normalizer(document.get("normalizer"))):
        return None
    stages = list(_stages(document.get("pre_tokenizer")))
    found = [_stage(stage) for stage in stages]
    line = "Ċ" if any(stage["type"] == "ByteLevel" for stage in stages) else "\n"
    if None in found or not _model(document["model"], line, ends_word=True in found):
        return None
    lines, followed = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("b\n\nb\n", f"b\n\nb\n{TAIL}"))
    if followed[: len(lines)] != lines or len(followed) == len(lines):
        return None
    tail = tuple(followed[len(lines) :])
    if not (_prepends(document.get("normalizer")) or any(_prepends(stage) for stage in stages)):
        return CutRule("", (), tail)
    if not _keeps_context(document):
        return None
    alone, behind = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("\n", f"\n{TAIL}"))
    return CutRule("\n", tuple(alone), tail) if behind == [*alone, *tail] else None


def _added(document: dict[str, Any]) -> bool:
    return not any(
        _LINE_THEN_LETTER.search(token["content"])
        or (token["lstrip"] and token["content"][:1] in tuple(string.ascii_letters))
        for token in document.get("added_tokens") or ()
    )


def _keeps_context(document: dict[str, Any]) -> bool:
    """Checks that no added token strips the line break before a cut, because the text behind it would then be encoded
    like the beginning of a text."""
    return not any(
        token["rstrip"] or (token["content"].endswith("\n") and token["content"] != "\n")
        for token in document.get("added_tokens") or ()
    )


def _normalizer(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    match normalizer["type"]:
        case "Sequence":
            return all(_normalizer(one) for one in normalizer["normalizers"])
        case "Prepend":
            return "\n" not in normalizer["prepend"]
        case "Replace":
            pattern = normalizer["pattern"].get("String")
            return pattern is not None and not _line_or_letter(pattern) and "\n" not in normalizer["content"]
        case kind:
            return kind in _CHARACTERWISE


def _line_or_letter(text: str) -> bool:
    return any(character == "\n" or character in string.ascii_letters for character in text)


def _stages(pre_tokenizer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] == "Sequence":
        for one in pre_tokenizer["pretokenizers"]:
            yield from _stages(one)
    else:
        yield pre_tokenizer


def _stage(stage: dict[str, Any]) -> bool | None:
    """Checks whether a stage of the pre-tokenizer ends a word at every cut; None if it may treat the halves
    differently."""
    match stage["type"]:
        case "ByteLevel":
            return splits_line(_GPT2) if stage.get("use_regex", True) else False
        case "Split":
            return _split(stage)
        case "Digits" | "Punctuation" | "Metaspace":
            return False
        case "Whitespace" | "WhitespaceSplit":
            return True
        case _:
            return None


def _split(stage: dict[str, Any]) -> bool | None:
    text, expression = stage["pattern"].get("String"), stage["pattern"].get("Regex")
    if text is not None:
        return None if _line_or_letter(text) else False
    if stage.get("invert") or stage["behavior"] not in ("Isolated", "Removed") or crosses(expression) is not False:
        return None
    return splits_line(expression)


def _model(model: dict[str, Any], line: str, *, ends_word: bool) -> bool:
    if model["type"] == "BPE" and model.get("dropout"):
        return False
    if ends_word:
        return model["type"] in ("BPE", "Unigram", "WordLevel", "WordPiece")
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    vocabulary = model["vocab"]
    known = line in vocabulary or (model.get("byte_fallback") and "<0x0A>" in vocabulary)
    if not known:  # it is passed over, or becomes one token with an unknown letter
        return False
    return not any(_LINE_THEN_LETTER.search(token) or ("<0x0A>" in token and token != "<0x0A>") for token in vocabulary)


def _prepends(component: dict[str, Any] | None) -> bool:
    """Checks whether a component prepends text to what is encoded."""
    if component is None:
        return False
    match component["type"]:
        case "Sequence":
            return any(_prepends(one) for one in component.get("normalizers") or ())
        case "Prepend":
            return True
        case "Metaspace":
            return component.get("prepend_scheme", "always") != "never" or bool(component.get("add_prefix_space"))
        case "ByteLevel":
            return bool(component.get("add_prefix_space"))
        case _:
            return False
