"""The tokenizer of a checkpoint folder: its files, loading it, and the tokens that a model lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.model_config import in_one_line, load_config
from minitron.specs.builds import CONFIG
from minitron.specs.encoding import recipe_of
from minitron.specs.errors import UsageError


@dataclass(frozen=True)
class LackingTokens:
    """The tokens of a tokenizer that a model has no row for, in words; empty where the model has a row for every one."""

    ordinary: str
    """The tokens that text is made of: the tokenizer is another model's."""

    added: str
    """The tokens that were added to it, as a padding token is, and the model never resized."""

    framing: str
    """The tokens that stand around every document."""


def lacking_tokens(tokenizer: Any, size: int) -> LackingTokens:
    """Describes the tokens from number `size` on, by their kind."""
    beyond = {int(number): str(token) for token, number in tokenizer.get_vocab().items() if number >= size}
    added = {number: token for number, token in beyond.items() if number in tokenizer.added_tokens_decoder}
    recipe = recipe_of(tokenizer)
    around = {number: token for number, token in added.items() if number in (recipe.bos, recipe.eos)}
    ordinary = {number: token for number, token in beyond.items() if number not in added}
    return LackingTokens(*(_in_words(tokens) for tokens in (ordinary, added if not around else {}, around)))


def _in_words(tokens: dict[int, str]) -> str:
    """Describes tokens: `<pad>` as token 32000, and 3 more"""
    if not tokens:
        return ""
    first = min(tokens)
    more = f", and {len(tokens) - 1} more" if len(tokens) > 1 else ""
    return f"`{tokens[first]}` as token {first}{more}"


TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """Yields the files of a checkpoint that make up its tokenizer, those of chat templates in their own folder too.
    Raises UsageError for a link that leads out of the folder: what is copied into a student must be the teacher's.
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
    """Raises UsageError where a file of a checkpoint folder is a link to a file elsewhere, but for one of the Hub's
    cache."""
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
    """Loads the tokenizer of a checkpoint folder. Raises UsageError where transformers cannot load one."""
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
