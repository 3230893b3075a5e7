"""Reads JSON documents from outside, within bounds: neither depth nor size of a file can exhaust this process."""

from __future__ import annotations

import json
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
