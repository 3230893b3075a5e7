"""Documents are tokenized once, into a stream that is found again by what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.runtime.data import Data, Wanted, data_hash, open_corpus
from minitron.runtime.models import load_tokenizer
from minitron.runtime.tokens import TextEncoder, token_stream
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.encoding import Encoder, recipe_of
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.listening import Messages


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    tiny.save_tokenizer(folder, bos=True)
    return folder


def source(folder: Path, content: str, **more: Any) -> DataSource:
    file = folder / "text.txt"
    file.write_text(content, encoding="utf-8")
    return DataSource(text=(str(file),), **more)


def read(folder: Path, content: str) -> Data:
    return Data.read(source(folder, content))


def test_documents_stand_between_bos_and_eos(tokenizer: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.load(tokenizer)
    data = source(tmp_path, "the cat\n\nsat on", document="line")
    stream = token_stream(data, content_hash(data), encoder, tmp_path / "c", Silent())
    words = [encoder.tokenizer(text, add_special_tokens=False).input_ids for text in ("the cat", "sat on")]
    assert stream.tolist() == [0, *words[0], 1, 0, *words[1], 1]


def test_a_tokenizer_that_puts_no_bos_gets_none(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "t", bos=False)
    encoder = TextEncoder.load(tmp_path / "t")
    data = source(tmp_path, "the cat")
    stream = token_stream(data, content_hash(data), encoder, tmp_path / "c", Silent())
    ids = stream.tolist()
    assert encoder.bos is None and 0 not in ids and ids[-1] == 1


def test_the_second_time_nothing_is_tokenized(tokenizer: Path, tmp_path: Path) -> None:
    encoder, progress, cache = TextEncoder.load(tokenizer), Messages(), tmp_path / "cache"
    data = source(tmp_path, "the cat sat")
    first = token_stream(data, content_hash(data), encoder, cache, progress)
    second = token_stream(data, content_hash(data), encoder, cache, progress)
    assert progress.texts == [f"tokenized 1 document: {len(first)} tokens"]
    assert first.tolist() == second.tolist()
    assert all(isinstance(array, np.memmap) for array in second.tokens.arrays), "they are mapped, not read"


def test_other_words_another_tokenizer_or_another_folder(tokenizer: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.load(tokenizer)
    (tmp_path / "moved").mkdir()
    here = data_hash(read(tmp_path, "the cat sat"), encoder, 100)
    assert here == data_hash(read(tmp_path / "moved", "the cat sat"), encoder, 100)
    assert here != data_hash(read(tmp_path, "the cat sat."), encoder, 100)
    tiny.save_tokenizer(tmp_path / "other", bos=True, vocabulary=280)
    assert here != data_hash(read(tmp_path, "the cat sat"), TextEncoder.load(tmp_path / "other"), 100)


def test_a_limit_cuts_the_stream(tokenizer: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.load(tokenizer)
    data = source(tmp_path, tiny.text(50, seed=0), document="line")
    whole = token_stream(data, content_hash(data), encoder, tmp_path / "c", Silent()).tolist()
    assert token_stream(data, content_hash(data), encoder, tmp_path / "c", Silent(), limit=33).tolist() == whole[:33]


def test_chat_messages_are_rendered_with_the_template(tokenizer: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8")
    encoder = TextEncoder.load(tokenizer)
    rows = [{"chat": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    data = DataSource(jsonl=(str(tmp_path / "chat.jsonl"),), messages_field="chat")
    stream = token_stream(data, content_hash(data), encoder, tmp_path / "c", Silent()).tolist()
    assert encoder.tokenizer.decode(stream) == "<s>user: the cat</s><s>assistant: sat</s>"


def test_chat_messages_without_a_template(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"chat": [{"role": "user", "content": "the cat"}]}', encoding="utf-8")
    data = DataSource(jsonl=(str(tmp_path / "chat.jsonl"),), messages_field="chat")
    with pytest.raises(WorkError, match=r"no chat template; add chat_template\.jinja"):
        token_stream(data, content_hash(data), TextEncoder.load(tokenizer), tmp_path / "c", Silent())


def test_too_little_text(tokenizer: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(tokenizer)
    encoder = TextEncoder(plain, "", Encoder(replace(recipe_of(plain), bos=None, eos=None)))
    with pytest.raises(WorkError, match="has 1 tokens, too few to predict one from another; name more data"):
        open_corpus(read(tmp_path, "a"), encoder, tmp_path / "c", Wanted(length=8, tokens=8, seed=0), Silent())


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="has no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
