"""The tokenizer of a checkpoint folder: its files, loading it, the last token that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.model_config import in_one_line, load_config
from minitron.specs.builds import CONFIG
from minitron.specs.errors import UsageError
from minitron.specs.json_files import read_json


def last_token(folder: Path) -> int | None:
    """The highest token number of the tokenizer in a folder; None where tokenizer.json is not there or is none."""
    try:
        document = read_json(folder / "tokenizer.json")
        vocabulary = document["model"]["vocab"]
        numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return int(max([*numbers, *(token["id"] for token in document.get("added_tokens") or ())]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that make up its tokenizer, those of chat templates in their own folder too.

    UsageError for a link that leads out of the folder: what is copied into a student must be the teacher's.
    """
    seen: set[Path] = set()
    for pattern in TOKENIZER_FILES:
        for path in sorted(folder.glob(pattern)):
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            check_inside(path, folder)
            yield path


def check_inside(path: Path, folder: Path) -> None:
    """UsageError where a file of a checkpoint folder is a link to a file elsewhere, but for one of the Hub's cache."""
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return
    # A snapshot of the cache is a folder of links to the blobs beside it; other folders may link to these too.
    from huggingface_hub import constants

    caches = [Path(constants.HF_HUB_CACHE).resolve()]
    if root.parent.name == "snapshots":
        caches.append(root.parent.parent)
    if real.parent.name == "blobs" and any(real.is_relative_to(cache) for cache in caches):
        return
    raise UsageError(f"{path} is a link to {real}, outside of the checkpoint's folder; copy the file there")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder. UsageError where there is none."""
    from transformers import AutoTokenizer

    try:
        # Where the tokenizer's own file names no class, the model's configuration does.
        config = load_config(folder) if (folder / CONFIG).is_file() else None
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # transformers raises anything
        reason = in_one_line(error)
        raise UsageError(
            f"{folder} has no tokenizer that transformers can load ({reason}); copy its files there"
        ) from None
