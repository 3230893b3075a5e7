"""The values that decide the tokens of a document, plain so that one process can send them to another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EncodingRecipe:
    """A tokenizer, its chat template, and the framing of each document: BOS if the tokenizer itself adds it, EOS if
    there is one."""

    tokenizer: str | None
    """The tokenizer as the `tokenizers` library writes it; None for one that is written in Python."""

    bos: int | None
    eos: int | None
    template: str | None
    tool_template: str | None
    """The template of conversations with tools, where it is another one."""

    special_tokens: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_of(tokenizer: Any) -> EncodingRecipe:
    """Returns the recipe of a tokenizer of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bos = tokenizer.bos_token_id
    ids = list(tokenizer("a").input_ids)
    return EncodingRecipe(
        tokenizer=None if backend is None else _plain(backend),
        bos=bos if bos is not None and ids[:1] == [bos] else None,
        eos=tokenizer.eos_token_id,
        template=_template(tokenizer, None),
        tool_template=_template(tokenizer, [{}]),
        special_tokens={
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        },
    )


def _plain(backend: Any) -> str:
    """Returns the tokenizer's JSON without the padding and truncation that an earlier call may have set."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str())


def _template(tokenizer: Any, tools: list[Any] | None) -> str | None:
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except (ValueError, AttributeError):
        return None
