"""The treatment of text from others, such as a model's output or a file's name, before it reaches a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns `text` without the characters that move a cursor: a model may write any byte, and a terminal interprets
    some of them.
    """
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)
