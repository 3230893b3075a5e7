"""Text that others wrote, such as a model or a file's name, before it reaches a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` without what moves a cursor: a model may write any byte, and a terminal obeys some of them."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)
