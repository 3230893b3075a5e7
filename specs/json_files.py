"""Reads JSON: documents from outside, within bounds, so that neither depth nor size of a file can exhaust this process; and
lines that a process appends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_LIMIT = 256_000_000
"""Bytes of a document that is parsed: ten times the largest tokenizer.json and index there are."""


def parse_json(text: bytes) -> Any:
    """Parses `text`, UTF-8 with or without a byte order mark. ValueError with the reason."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """Returns the value in a file. ValueError with the reason if the file is larger than `limit` bytes or holds no
    JSON."""
    with path.open("rb") as handle:
        text = handle.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return parse_json(text)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON Lines that a process appends to; none where there is no such file. A line that is
    not whole, because the process was killed, is skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line
