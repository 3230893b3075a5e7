"""Suggests known words for misspelled ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that `word` is most likely a misspelling of; None if none is near."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=0.6) or (
        difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    )
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the beginning of a hint, which ends in a space: the known word that `word` may be; empty if none is near."""
    nearest = closest(word, known)
    return f"did you mean `{nearest}`? " if nearest else ""


def one_of(words: Sequence[str]) -> str:
    """Joins words for a message: `a`, `a or b`, `a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
