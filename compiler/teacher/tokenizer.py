"""The tokenizer of a checkpoint folder: its files, loading it, the last token that it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.specs.errors import UsageError, first_line


def last_token(folder: Path) -> int | None:
    """The highest token number of the tokenizer in a folder; None where tokenizer.json is not there or is none."""
    try:
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return int(max([*numbers, *(token["id"] for token in document.get("added_tokens") or ())]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates",
)  # fmt: skip


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that make up its tokenizer."""
    seen: set[Path] = set()
    for pattern in TOKENIZER_FILES:
        for path in sorted(folder.glob(pattern)):
            if path not in seen:
                seen.add(path)
                yield path


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder. UsageError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything
        reason = first_line(error)
        raise UsageError(
            f"{folder} has no tokenizer that transformers can load ({reason}); copy its files there"
        ) from None
