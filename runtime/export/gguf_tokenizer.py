"""Writes a Hugging Face tokenizer as the keys of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron.runtime.models import Tokenizer, load_tokenizer
from minitron.specs.errors import UsageError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # token types of the format
_PROBE = "12345HelloWorld"
# What the pre-tokenizers that families are published with make of the probe. llama.cpp holds their rules by name.
_KNOWN = {
    ("llama", 128_256): ("llama-bpe", ["123", "45", "HelloWorld"]),
    ("mistral", 131_072): ("tekken", ["1", "2", "3", "4", "5", "Hello", "World"]),
    ("qwen2", None): ("qwen2", ["1", "2", "3", "4", "5", "HelloWorld"]),
    ("qwen3", None): ("qwen2", ["1", "2", "3", "4", "5", "HelloWorld"]),
}


def add_tokenizer(writer: Any, folder: Path, config: Any, pre: str | None) -> None:
    """Writes the tokenizer of a model's folder. `pre` is llama.cpp's name of the pre-tokenizer, for tokenizers whose
    pre-tokenizer is not recognised; UsageError where it is then missing, and for kinds of tokenizers that the format
    does not have.
    """
    tokenizer = load_tokenizer(folder)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    model = inner["model"]
    if model["type"] != "BPE":
        raise UsageError(f"a tokenizer of the kind {model['type']} cannot be written as GGUF; possible is BPE")
    tokens, types = _tokens(tokenizer, config.vocab_size)
    merges = [one.split(" ") if isinstance(one, str) else list(one) for one in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # Pieces are merged by their score there, the highest first: so by the rank of the merge that makes them.
        rank = {"".join(pair): float(-place - 1) for place, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(token, -float(len(merges) + 1)) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _pre_tokenizer(tokenizer, config))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Returns text and type of every row of the embedding; rows without a token get a placeholder."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[unused{number}]")
            types.append(_UNUSED)
            continue
        tokens.append(token)
        if number in added:
            types.append(_CONTROL if added[number].special else _USER)
        elif number == tokenizer.unk_token_id:
            types.append(_UNKNOWN)
        else:
            types.append(_BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else _NORMAL)
    return tokens, types


def _pre_tokenizer(tokenizer: Tokenizer, config: Any) -> str:
    """Returns the name of the pre-tokenizer, where the model belongs to a family that is published with it and the
    tokenizer behaves like it.
    """
    kind, size = config.model_type, config.vocab_size
    known = _KNOWN.get((kind, size)) or _KNOWN.get((kind, None))
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(_PROBE)]
    if known is None or pieces != known[1]:
        raise UsageError(
            "how this tokenizer cuts text before it merges cannot be told by itself, and llama.cpp knows that by name only; "
            "write --pre NAME, as in --pre llama-bpe, --pre qwen2, --pre gpt-2"
        )
    return known[0]
