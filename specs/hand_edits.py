"""Recognises what somebody has changed in training.yaml since it was generated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minitron.specs.builds import TRAINING
from minitron.specs.one_line import plain

_GENERATED = "# As generated: sha256:"
_SHOWN = 3  # edits that a sentence names one by one


@dataclass(frozen=True)
class Edit:
    """One value of training.yaml that somebody changed by hand: its dotted path, and both values (None: not there)."""

    path: str
    generated: Any
    written: Any

    def __str__(self) -> str:
        return f"{self.path} {_value(self.generated)} -> {_value(self.written)}"


def in_short(edits: tuple[Edit, ...]) -> str:
    """Names the first edits in a sentence."""
    more = f" and {len(edits) - _SHOWN} more" if len(edits) > _SHOWN else ""
    return ", ".join(str(edit) for edit in edits[:_SHOWN]) + more


def with_mark(text: str) -> str:
    """Adds to the text of training.yaml the line by which a later hand edit is recognised."""
    return f"{_GENERATED}{_digest(text)}\n{text}"


def hand_edits(build: Path, plan: Mapping[str, Any]) -> tuple[Edit, ...]:
    """Returns what somebody has changed in training.yaml since it was generated; comments and order do not count."""
    generated = plan.get("training")
    try:
        text = (build / TRAINING).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    mark, _, body = text.partition("\n")
    if not isinstance(generated, dict) or mark == f"{_GENERATED}{_digest(body)}":
        return ()
    try:
        written = yaml.safe_load(text)
    except yaml.YAMLError:
        return (Edit(TRAINING, "YAML", "something else"),)
    return tuple(differences(generated, written))


def differences(before: Any, now: Any, at: str = "") -> Iterator[Edit]:
    """Yields the differences of two documents, value by value."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{at}.{key}".lstrip("."))
    elif before != now:
        yield Edit(at, before, now)


def _value(value: Any) -> str:
    return "nothing" if value is None else plain(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
