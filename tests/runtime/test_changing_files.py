"""Data files that change while they are tokenized: their tokens never lie under the hash of what they were."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron.runtime.arrivals import TokenizingProcess
from minitron.runtime.tokens import TextEncoder, token_stream
from minitron.specs.data import DataSource, Source
from minitron.specs.documents import content_hash
from minitron.specs.documents.changes import marks_of
from minitron.specs.encoding import pool
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from minitron.specs.shards import growing
from minitron.specs.shards.growing import GrowingStream
from minitron.specs.shards.stream import ShardIndex, read_shard_index
from minitron.specs.shards.writer import Part, write_stream
from tests.runtime.tiny import save_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, bos=False)
    return TextEncoder.load(folder)


LINES = [f"the document number {number} of this file" for number in range(30)]


def text(file: Path) -> dict[str, Any]:
    file.write_text("\n".join(LINES) + "\n")
    return {"text": (str(file),), "document": "line"}


def jsonl(file: Path) -> dict[str, Any]:
    file.write_text("\n".join(json.dumps({"text": line}) for line in LINES) + "\n")
    return {"jsonl": (str(file),)}


def parquet(file: Path) -> dict[str, Any]:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.table({"text": LINES}), file)
    return {"parquet": (str(file),)}


def two_files(kind: Callable[[Path], dict[str, Any]], folder: Path) -> DataSource:
    first, second = (kind(folder / name) for name in ("a", "b"))
    (key,) = first.keys() - {"document"}
    return DataSource.model_validate(first | {key: (*first[key], *second[key])})


def append(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b" ")


def shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


@pytest.mark.parametrize("kind", [text, jsonl, parquet])
@pytest.mark.parametrize("change", [append, Path.unlink])
def test_no_shard_is_written_of_a_file_that_has_changed(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(pool, "_BATCH_DOCUMENTS", 4)
    part = Part(two_files(kind, tmp_path), tmp_path / "stream", marks=marks_of(two_files(kind, tmp_path)))
    how = replace(encoder.tokenizing(), shard_tokens=200)
    turns = write_stream(part, how, Silent())
    next(turns)
    change(tmp_path / "b")
    with pytest.raises(
        WorkError, match=r"/b(: cannot be read|: is not a .*parquet| has changed while its text .*; let)"
    ):
        for _ in turns:
            pass
    written = shards(part.folder)
    whole = tmp_path / "whole"
    two_files(kind, tmp_path)
    for _ in write_stream(replace(part, folder=whole, marks=None), how, Silent()):
        pass
    assert 1 <= written < shards(whole) and not (part.folder / "stream.json").exists()
    for number in range(written):
        name = f"shard-{number:06d}.tokens"
        assert (part.folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_file_may_change_when_all_of_it_is_written(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_BATCH_DOCUMENTS", 4)
    how, part = replace(encoder.tokenizing(), shard_tokens=200), Part(two_files(text, tmp_path), tmp_path / "stream")
    (*_, total) = write_stream(part, how, Silent())
    changed = 0
    for tokens in write_stream(replace(part, folder=tmp_path / "other"), how, Silent()):
        if tokens > 0.7 * total:  # in the second file
            append(tmp_path / "a")
            changed += 1
    assert changed > 1 and tokens == total and (tmp_path / "other" / "stream.json").exists()


def test_what_changed_before_the_first_document_is_noticed(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever writes: this process, or one of its own that hears of the files by a pipe."""
    source: Source = two_files(text, tmp_path)
    content, marks = content_hash(source), marks_of(source)
    append(tmp_path / "b")
    message = f"{tmp_path / 'b'} has changed while its text was turned into tokens; let the data rest"
    with pytest.raises(WorkError, match=message):
        token_stream(source, content, encoder, tmp_path / "cache", Silent(), marks=marks)
    # What start-up files of Python print is no message of the process.
    (tmp_path / "sitecustomize.py").write_text("print('good morning')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = TokenizingProcess([[Part(source, tmp_path / "stream", marks=marks)]], encoder)
    while not process.ended():
        time.sleep(0.05)
    assert str(process.failure()).startswith(message)
    process.close()
    assert not shards(tmp_path / "stream") and not list((tmp_path / "cache").glob("*/shard*"))


@pytest.mark.parametrize(("seconds", "changed"), [(0.4, False), (60.0, True)])
def test_a_file_of_the_same_size_is_known_by_its_time(
    encoder: TextEncoder, tmp_path: Path, seconds: float, changed: bool
) -> None:
    source = two_files(text, tmp_path)
    os.utime(tmp_path / "b", (1e9, 1e9))
    part = Part(source, tmp_path / "stream", marks=marks_of(source))
    os.utime(tmp_path / "b", (1e9 + seconds, 1e9 + seconds))
    with pytest.raises(WorkError, match="/b has changed") if changed else nullcontext():
        assert list(write_stream(part, encoder.tokenizing(), Silent()))


def test_files_that_are_not_there_have_no_marks(tmp_path: Path) -> None:
    """Ranks that do not tokenize need not have the data."""
    source = two_files(text, tmp_path)
    (tmp_path / "a").unlink()
    assert list(marks_of(source)) == [str(tmp_path / "b")]


def test_a_shard_that_goes_between_two_looks_is_not_there_yet(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a cache is pruned under a training."""
    part = Part(two_files(text, tmp_path), tmp_path / "stream")
    (*_, total) = write_stream(part, replace(encoder.tokenizing(), shard_tokens=200), Silent())
    stream, real = GrowingStream(part.folder), read_shard_index
    lost = part.folder / "shard-000001.tokens"
    content = lost.read_bytes()

    def removed(folder: Path, number: int) -> ShardIndex:
        index = real(folder, number)
        if number == 1:
            lost.unlink()
        return index

    with monkeypatch.context() as patch:
        patch.setattr(growing, "read_shard_index", removed)
        assert [len(stream.poll()) for _ in range(2)] == [1, 0]
    lost.write_bytes(content)
    assert len(stream.poll()) > 1 and stream.ended
    assert len(stream) == total == len(stream.learnt)
