"""The tokenized data on disk: damage is seen and mended, a killed call is gone on with, marks and foreign tokens count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.runtime import tokens as tokens_module
from minitron.runtime.data import Data, Wanted, Windows, open_corpus, open_held_out
from minitron.runtime.tokens import TextEncoder, token_stream
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from minitron.specs.shards import stream as stream_module
from minitron.specs.shards import writer as writer_module
from minitron.specs.shards.stream import TokenStream, shard_file
from tests.runtime import tiny
from tests.runtime.listening import Messages
from tests.specs.test_data_forms import megatron


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    tiny.save_tokenizer(tmp_path / "tokenizer", bos=True)
    return TextEncoder.load(tmp_path / "tokenizer")


@pytest.fixture
def data(tmp_path: Path) -> DataSource:
    (tmp_path / "text.txt").write_text(tiny.text(60, seed=0), encoding="utf-8")
    return DataSource(text=(str(tmp_path / "text.txt"),), document="line")


def read(data: DataSource, encoder: TextEncoder, folder: Path, progress: Any = None, **options: Any) -> TokenStream:
    return token_stream(data, content_hash(data), encoder, folder / "cache", progress or Silent(), **options)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_TOKENS", 100)
    monkeypatch.setattr(stream_module, "BLOCK_TOKENS", 32)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("place", [0, 60, -1])
@pytest.mark.parametrize("number", [0, 2])
def test_a_flipped_bit_is_seen_and_the_data_made_again(
    encoder: TextEncoder, data: DataSource, tmp_path: Path, number: int, place: int
) -> None:
    whole, progress = read(data, encoder, tmp_path).tolist(), Messages()
    (folder,) = (tmp_path / "cache").iterdir()
    flip(shard_file(folder, number, "tokens"), place)
    assert read(data, encoder, tmp_path, progress).tolist() == whole
    assert "the tokenized data is made again" in progress.texts[0] and "is damaged" in progress.texts[0]


@pytest.mark.usefixtures("small_shards")
def test_every_other_damage_is_mended_too(encoder: TextEncoder, data: DataSource, tmp_path: Path) -> None:
    whole = read(data, encoder, tmp_path).tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    tokens, index = shard_file(folder, 1, "tokens"), shard_file(folder, 1, "json")
    about = json.loads(index.read_text())
    for damage in (
        lambda: tokens.write_bytes(tokens.read_bytes()[:-2]),
        tokens.unlink,
        index.unlink,
        lambda: index.write_text("{"),
        lambda: index.write_text("[" * 10**5),
        lambda: index.write_text(json.dumps(about | {"largest": 3})),
        lambda: index.write_text(json.dumps(about | {"dtype": "float99"})),
        lambda: (folder / "stream.json").write_text("[1]"),
        (folder / "stream.json").unlink,
    ):
        damage()
        assert read(data, encoder, tmp_path).tolist() == whole


@pytest.mark.usefixtures("small_shards")
def test_a_large_stream_is_checked_where_it_is_read(
    encoder: TextEncoder, data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_CHECKED_BYTES", 0)
    whole = read(data, encoder, tmp_path)
    good, far = whole[0:40].tolist(), whole[130:140].tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    flip(shard_file(folder, 1, "tokens"), 2)
    stream = read(data, encoder, tmp_path)
    assert stream[0:40].tolist() == good, "what was not damaged is read"
    with pytest.raises(WorkError, match=r"shard-000001\.tokens: the tokenized data is damaged; run the command again"):
        stream[90:140]
    assert read(data, encoder, tmp_path)[130:140].tolist() == far


@pytest.mark.usefixtures("small_shards")
def test_a_killed_call_is_gone_on_with_by_shard(
    encoder: TextEncoder, data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(data, encoder, tmp_path / "other").tolist()
    real, encoded = writer_module.encode_all, []

    def killed(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in real(*args, **options):
            yield batch[:25]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "encode_all", killed)
        with pytest.raises(KeyboardInterrupt):
            read(data, encoder, tmp_path)

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in real(*args, **options):
            encoded.extend(batch)
            yield batch

    monkeypatch.setattr(writer_module, "encode_all", counted)
    progress = Messages()
    assert read(data, encoder, tmp_path, progress).tolist() == whole
    assert 0 < len(encoded) < 45, "what was written is not tokenized again"
    assert progress.texts[0].startswith("going on with the tokenized data after ")
    assert progress.texts[1] == f"tokenized 60 documents: {len(whole)} tokens"


def test_what_was_left_out_is_said(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{\n{"text": "a \\ud800 mat"}\n{"text": null}\n')
    data = DataSource(jsonl=(str(tmp_path / "a.jsonl"),), on_error="skip")
    progress = Messages()
    read(data, encoder, tmp_path, progress)
    assert progress.texts[0].startswith("tokenized 2 documents")
    assert progress.texts[1].startswith("1 document could not be read and was left out")
    assert "in 1 document halves of surrogate pairs were replaced" in progress.texts[2]
    about = json.loads(next((tmp_path / "cache").glob("*/stream.json")).read_text())
    assert (about["documents"], about["empty"], about["skipped"], about["repaired"]) == (2, 1, 1, 1)


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def chat(tmp_path: Path) -> tuple[TextEncoder, DataSource]:
    tiny.save_tokenizer(tmp_path / "chat", bos=True)
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = [CHAT, [{"role": "system", "content": "a"}], CHAT * 3]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    data = DataSource(jsonl=(str(tmp_path / "chat.jsonl"),), messages_field="messages", train_on="assistant")
    return TextEncoder.load(tmp_path / "chat"), data


@pytest.mark.usefixtures("small_shards")
def test_only_the_assistant_s_tokens_are_learnt(chat: tuple[TextEncoder, DataSource], tmp_path: Path) -> None:
    encoder, data = chat
    corpus = open_corpus(Data.read(data), encoder, tmp_path / "c", Wanted(length=7, tokens=100, seed=0), Silent())
    (windows,) = corpus.sources
    batch = windows.batch(range(len(windows)))
    answers = encoder.tokenizer.decode(batch.labels_BL[batch.valid_BL].tolist())
    assert answers == "sat on a mat</s>" * 4
    held_out = open_held_out(
        data, content_hash(data), encoder, tmp_path / "c", length=7, max_tokens=50, progress=Silent()
    )
    assert held_out.learnt is not None and 0 < int(held_out.batch(range(len(held_out))).valid_BL.sum()) < 50


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_marks_follow_their_tokens_through_windows(bos: int | None, length: int) -> None:
    stream = np.asarray([0, 10, 11, 12, 1, 0, 20, 21, 1, 0, 30, 31, 32, 33, 1])
    learnt = stream % 2 == 1
    windows = Windows(stream, length, bos, learnt)
    batch = windows.batch(range(len(windows)))
    expected = [token for token in stream[(bos is None) :].tolist() if token % 2]
    assert batch.labels_BL[batch.valid_BL].tolist() == expected


def test_tokens_of_megatron_stay_where_they_are(encoder: TextEncoder, tmp_path: Path) -> None:
    files = [megatron(tmp_path, [[0, 5, 6, 1], [0, 7, 1]], "a"), megatron(tmp_path, [[0, 9, 1]], "b", "<i4", 4)]
    data = DataSource(megatron=tuple(map(str, files)))
    stream = read(data, encoder, tmp_path)
    assert stream.tolist() == [0, 5, 6, 1, 0, 7, 1, 0, 9, 1]
    assert stream.largest.id == 9 and stream.largest.where.endswith("b.bin")
    assert not list((tmp_path / "cache").glob("*/shard-*")), "nothing is copied"
    assert read(data, encoder, tmp_path, limit=8).tolist() == [0, 5, 6, 1, 0, 7, 1, 0]
    bad = megatron(tmp_path, [[0, -3]], "c", "<i4", 4)
    with pytest.raises(WorkError, match=r"c\.bin: holds the token -3; token ids begin with 0"):
        read(DataSource(megatron=(str(bad),)), encoder, tmp_path)
