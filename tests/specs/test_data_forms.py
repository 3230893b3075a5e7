"""Data as users have it: compressed, nested, with null and broken rows, as arrays, as tokens; and files that are no data."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.specs.data import BlendPart, DataSource
from minitron.specs.documents import (
    Conversation,
    Tally,
    TokenIds,
    check_readable,
    content_hash,
    iter_documents,
    iter_pieces,
    resolve,
)
from minitron.specs.documents import check as checking
from minitron.specs.documents.opening import BLOCK
from minitron.specs.errors import Refused, WorkError
from tests.specs.conftest import Load
from tests.specs.specimens import SMALL

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def source(**keys: Any) -> DataSource:
    return DataSource.model_validate(keys)


def read(folder: Path, tally: Tally | None = None, **keys: Any) -> list[Any]:
    return list(iter_documents(resolve(source(**keys), folder), tally=tally))


def rows(path: Path, *values: object) -> None:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")


# --- files ---


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path: Path, ending: str) -> None:
    if ending == ".zst":
        arrow = pytest.importorskip("pyarrow", reason=".zst needs pyarrow")
    lines = [{"text": f"row {number}"} for number in range(2000)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    packed = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: arrow.compress(data, codec="zstd", asbytes=True),
    }[ending](content)
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(packed)
    assert read(tmp_path, jsonl=file.name) == [line["text"] for line in lines]
    check_readable(resolve(source(jsonl=file.name), tmp_path))
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(WorkError, match=rf"a\.jsonl\{ending}: is not a whole \{ending} file \(.+\); write it again"):
        read(tmp_path, jsonl=file.name)


def test_byte_order_marks_and_carriage_returns_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert read(tmp_path, jsonl="a.jsonl") == ["one", "two"]
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\r\n")
    assert read(tmp_path, text="a.txt") == ["one\ntwo\n"]
    assert read(tmp_path, text="a.txt", document="line") == ["one", "two"]


def test_a_json_array_is_read_element_by_element(tmp_path: Path) -> None:
    values = [{"text": f"{number} " * 40_000} for number in range(30)]
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b" \n" + json.dumps(values, indent=1).encode())
    assert read(tmp_path, jsonl="a.json") == [value["text"] for value in values]
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(WorkError, match="there is no document in"):
        read(tmp_path, jsonl="empty.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"txt": "b"}]', "element 2: has no field `text`"),
        ('[{"text": "a"}', "is not a whole JSON array"),
        ('[{"text": "a"} {"text": "b"}]', "is not a whole JSON array"),
        ('[{"text": "a"}] []', "goes on behind the end of its JSON array"),
        ('[{"text": "a"}, {]', "element 2: is not JSON"),
        ('[{"text": "a"}, ' + "[" * 100_000, "element 2: is nested too deeply"),
    ],
)
def test_a_broken_array_is_named_with_its_element(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(WorkError, match=message):
        read(tmp_path, jsonl="a.json")


def test_a_long_file_comes_in_pieces_that_make_up_the_whole(tmp_path: Path) -> None:
    text = "".join(f"Line {number} of many, with a few words in it.\n" for number in range(100_000))
    (tmp_path / "long.txt").write_text(text)
    pieces = list(iter_pieces(resolve(source(text="long.txt"), tmp_path)))
    assert len(pieces) > 3 and all(len(str(piece.content)) < 2 * BLOCK for piece in pieces)
    assert [(piece.begins, piece.ends) for piece in pieces[:2]] == [(True, False), (False, False)] and pieces[-1].ends
    assert read(tmp_path, text="long.txt") == [text]


# --- rows ---


def test_null_and_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    tally = Tally()
    rows(tmp_path / "a.jsonl", {"text": None}, {"text": "one"}, {"text": " "}, {"text": ""})
    assert read(tmp_path, tally, jsonl="a.jsonl") == ["one"]
    assert (tally.documents, tally.empty, tally.skipped) == (1, 3, 0)


def test_a_field_inside_a_field(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"content": {"body": "one"}}, {"content.body": "two", "content": {"body": "no"}})
    assert read(tmp_path, jsonl="a.jsonl", text_field="content.body") == ["one", "two"]
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    table = arrow.table({"content": [{"body": "one", "other": 1}], "more": [1]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path, parquet="a.parquet", text_field="content.body") == ["one"]


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path: Path) -> None:
    tally = Tally()
    chat = [{"role": "user", "content": "\ud800 hi"}]
    rows(tmp_path / "a.jsonl", {"text": "a \udc80 b", "chat": chat}, {"text": "\U0001f600", "chat": CHAT})
    assert read(tmp_path, tally, jsonl="a.jsonl") == ["a \ufffd b", "\U0001f600"]
    assert tally.repaired == 1 and "1 document halves of surrogate pairs" in tally.notes()[0]
    messages = read(tmp_path, jsonl="a.jsonl", messages_field="chat")
    assert messages == [Conversation([{"role": "user", "content": "\ufffd hi"}]), Conversation(CHAT)]


def test_pairs_system_messages_and_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    rows(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "completion": "Hello", "chat": CHAT, "tools": tools},
        {"prompt": "a", "completion": None, "chat": [{"role": "system", "content": "own"}, *CHAT], "tools": None},
    )
    system = {"role": "system", "content": "be kind"}
    pairs = read(tmp_path, jsonl="a.jsonl", prompt_field="prompt", train_on="assistant", system="be kind")
    assert pairs == [Conversation([system, *CHAT], train_on="assistant", pair=True)]
    chats = read(tmp_path, jsonl="a.jsonl", messages_field="chat", tools_field="tools", system="be kind")
    assert chats[0] == Conversation([system, *CHAT], tools) and chats[1].messages[0]["content"] == "own"
    rows(tmp_path / "b.jsonl", {"chat": CHAT, "tools": json.dumps(tools)})
    assert read(tmp_path, jsonl="b.jsonl", messages_field="chat", tools_field="tools")[0].tools == tools
    rows(tmp_path / "b.jsonl", {"chat": CHAT, "tools": "clock"})
    with pytest.raises(WorkError, match=r"b\.jsonl:1: `tools` is not a list of tools"):
        read(tmp_path, jsonl="b.jsonl", messages_field="chat", tools_field="tools")


# --- what cannot be read ---


def test_under_skip_broken_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b"{", b'{"txt": 1}', b'{"text": "caf\xe9"}', b"[" * 100_000, b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    tally = Tally()
    assert read(tmp_path, tally, jsonl="*.jsonl*", on_error="skip") == ["one", "two"]
    assert tally.documents == 2 and tally.skipped == 5
    assert "5 documents could not be read and were left out, such as" in tally.notes()[0]
    assert "a.jsonl:2: is not JSON" in tally.notes()[0]
    check_readable(resolve(source(jsonl="*.jsonl*", on_error="skip"), tmp_path))
    with pytest.raises(WorkError, match=r"a\.jsonl:2: is not JSON"):
        read(tmp_path, jsonl="*.jsonl*", on_error="fail")


def test_under_skip_a_text_file_is_left_out_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"Good line.\n" * 300_000 + b"caf\xe9\n")
    (tmp_path / "b.txt").write_text("good")
    tally = Tally()
    assert read(tmp_path, tally, text="*.txt", on_error="skip") == ["good"] and tally.skipped == 1
    (tmp_path / "b.txt").unlink()
    with pytest.raises(
        WorkError, match=r"there is no document in .* \(1 could not be read, such as .*a\.txt: is not UTF"
    ):
        read(tmp_path, text="*.txt", on_error="skip")


def test_under_skip_a_line_is_left_out_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ncaf\xe9\nbad \xff\xfe\n\ntwo\nthree")
    for document, kept in (("line", ["one", "two", "three"]), ("paragraph", ["one", "two\nthree"])):
        tally = Tally()
        assert read(tmp_path, tally, text="a.txt", document=document, on_error="skip") == kept
        assert tally.skipped == (2 if document == "line" else 1)
    assert "a.txt:3: is not UTF-8 text; convert it" in tally.notes()[0]
    with pytest.raises(WorkError, match=r"a\.txt: is not UTF-8 text"):
        read(tmp_path, text="a.txt", document="line")


@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_under_skip_nothing_is_read_of_a_text_in_utf_16(tmp_path: Path, document: str) -> None:
    """Most of its lines are UTF-8 as well, with a NUL between any two letters."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n", encoding="utf-16")
    (tmp_path / "b.txt").write_text("four\nfi\0ve\n")  # UTF-8, whatever it means
    tally = Tally()
    kept = {"line": ["four", "fi\0ve"], "paragraph": ["four\nfi\0ve"]}
    assert read(tmp_path, tally, text=["a.txt", "b.txt"], document=document, on_error="skip") == kept[document]
    assert tally.skipped == (6 if document == "line" else 1)


def test_tokens_that_no_vocabulary_has_and_roles_that_are_none(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"ids": [1, 2**70], "chat": [{"role": 5, "content": "a"}]})
    with pytest.raises(
        WorkError, match=r"a\.jsonl:1: `ids` holds 1180591620717411303424, which is no token of any voc"
    ):
        read(tmp_path, jsonl="a.jsonl", ids_field="ids")
    with pytest.raises(WorkError, match=r"a\.jsonl:1: `chat` is not a list of messages such as"):
        read(tmp_path, jsonl="a.jsonl", messages_field="chat")


@pytest.mark.parametrize("small", [True, False], ids=["read whole", "sampled"])
def test_faults_past_the_first_lines_are_found_before_anything_begins(
    tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(checking, "WHOLE_BYTES", 0)
    good = [{"text": "a" * 50}] * 400
    rows(tmp_path / "a.jsonl", *good[:186], {"txt": 1}, *good[186:])
    with pytest.raises(WorkError, match="has no field `text`"):
        check_readable(resolve(source(jsonl="a.jsonl"), tmp_path))
    rows(tmp_path / "a.jsonl", *good)
    rows(tmp_path / "b.jsonl", {"body": "the second file of the list"})
    with pytest.raises(WorkError, match=r"b\.jsonl:1: has no field `text`"):
        check_readable(resolve(source(jsonl="*.jsonl"), tmp_path))
    check_readable(resolve(source(jsonl="a.jsonl"), tmp_path))
    (tmp_path / "a.txt").write_bytes("Zeile für Zeile\n".encode() * 100_000)
    check_readable(resolve(source(text="a.txt"), tmp_path))
    (tmp_path / "a.txt").write_bytes(b"Line\n" * 500_000 + b"caf\xe9 au lait\n" * 50_000)
    with pytest.raises(WorkError, match=r"a\.txt: is not UTF-8 text"):
        check_readable(resolve(source(text="a.txt"), tmp_path))


def test_the_columns_of_every_parquet_file_are_checked(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(arrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    write(arrow.table({"body": ["two"]}), tmp_path / "b.parquet")
    with pytest.raises(WorkError, match=r"b\.parquet: has no field `text`; there is `body`"):
        check_readable(resolve(source(parquet="*.parquet"), tmp_path))


def test_files_that_are_no_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("text")
    resolved = resolve(source(text="a.txt"), tmp_path)
    for pattern, message in {
        "pipe": "`pipe` is not a regular file",
        "/dev/zero": "`/dev/zero` is not a regular file",
        "/**/*.txt": "`/\\*\\*/\\*.txt` searches all of /",
        "/proc/*/**": "searches all of /proc",
        "a\0b": r"`a\\x00b` is not a valid file name",
        "a" * 5000: "`a+\\.\\.\\.a+` is not a valid file name",
    }.items():
        with pytest.raises(Refused, match=message):
            resolve(source(text=pattern), tmp_path)
    with pytest.raises(Refused, match="`/` is not a data set"):
        resolve(source(dataset="/"), tmp_path)
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")  # what was a file when the plan was made
    for action in (content_hash, check_readable, lambda data: list(iter_documents(data))):
        with pytest.raises(WorkError, match=r"a\.txt: is not a regular file"):
            action(resolved)


# --- tokens ---


def megatron(folder: Path, documents: list[list[int]], name: str = "t", dtype: str = "<u2", code: int = 8) -> Path:
    """Written as Megatron-LM's `MMapIndexedDatasetBuilder` does."""
    file = folder / f"{name}.bin"
    np.concatenate([np.asarray(one, dtype) for one in documents]).tofile(file)
    lengths = np.asarray([len(one) for one in documents], "<i4")
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    marks = np.arange(len(documents) + 1, dtype="<i8")
    file.with_suffix(".idx").write_bytes(head + lengths.tobytes() + offsets.astype("<i8").tobytes() + marks.tobytes())
    return file


def test_tokens_of_megatron_are_read_as_they_are(tmp_path: Path) -> None:
    documents = [[5, 6, 7], [8], [9, 10]]
    for number, (dtype, code) in enumerate([("<u2", 8), ("<i4", 4)]):
        megatron(tmp_path, documents, f"t{number}", dtype, code)
    found = read(tmp_path, megatron="t*.bin")
    assert all(isinstance(one, TokenIds) for one in found) and [[*one.ids] for one in found] == 2 * documents
    check_readable(resolve(source(megatron="t0.bin"), tmp_path))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda file: file.with_suffix(".idx").unlink(), r"t\.idx: cannot be read \(No such file"),
        (lambda file: file.with_suffix(".idx").write_bytes(b"nothing"), "is not an index of Megatron-LM"),
        (lambda file: file.write_bytes(file.read_bytes()[:-2]), r"t\.bin has 8 bytes and not 10"),
        (lambda file: file.with_suffix(".idx").write_bytes(file.with_suffix(".idx").read_bytes()[:-4]), "cut short"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    file = megatron(tmp_path, [[1, 2], [3, 4, 5]])
    resolved = resolve(source(megatron="t.bin"), tmp_path)
    break_it(file)
    with pytest.raises(WorkError, match=message):
        check_readable(resolved)


def test_rows_of_token_ids(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"input_ids": [3, 4]}, {"input_ids": []})
    assert read(tmp_path, jsonl="a.jsonl", ids_field="input_ids") == [TokenIds([3, 4])]
    for wrong in ([-1], [1.5], "text", [True]):
        rows(tmp_path / "a.jsonl", {"input_ids": wrong})
        with pytest.raises(WorkError, match="`input_ids` is not a list of token ids"):
            read(tmp_path, jsonl="a.jsonl", ids_field="input_ids")


# --- splits ---


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "files"])
def test_a_part_of_a_split_works_for_folders(tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets need datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = {"train": [f"a{number}" for number in range(10)], "test": ["b0", "b1"]}
    if saved:
        parts = {name: datasets.Dataset.from_dict({"text": values}) for name, values in texts.items()}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
        parts["train"].save_to_disk(tmp_path / "one")
        assert read(tmp_path, dataset="one", split="train[8:]") == ["a8", "a9"]
    else:
        (tmp_path / "d").mkdir()
        for name, values in texts.items():
            rows(tmp_path / "d" / f"{name}.jsonl", *({"text": value} for value in values))
    assert read(tmp_path, dataset="d", split="train[:50%]") == texts["train"][:5]
    assert read(tmp_path, dataset="d", split="test+train[-2:]") == ["b0", "b1", "a8", "a9"]
    with pytest.raises(WorkError, match=r"has no split `valid\[:1\]` \(.+\); write one of `train`, `test`, or a part"):
        read(tmp_path, dataset="d", split="valid[:1]")


def test_a_part_of_a_stream_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="data sets need datasets")
    (tmp_path / "d").mkdir()
    rows(tmp_path / "d" / "train.jsonl", {"text": "a"})
    with pytest.raises(WorkError, match=r"is streamed, and `train\[:50%\]` needs its length; write one of `train`"):
        read(tmp_path, dataset="d", split="train[:50%]", streaming=True)


# --- the language ---


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"jsonl": "a", "text_field": "a", "ids_field": "b"}, "says both `text_field` and `ids_field`", "keep one"),
        ({"jsonl": "a", "train_on": "assistant"}, "`train_on` goes with `messages_field` or `prompt_field`", "add"),
        ({"jsonl": "a", "prompt_field": "p", "tools_field": "t"}, "`tools_field` goes with `messages_field`", "add"),
        ({"text": "a", "text_field": "b"}, "`text_field` goes with `jsonl`", "leave it out"),
        ({"dataset": "a/b", "revision": "../../secret"}, "is not a branch, tag or commit", "write a name such as main"),
        ({"dataset": "a/b", "revision": "/etc/passwd"}, "is not a branch, tag or commit", "write a name such as main"),
        ({"blend": [{"text": "a"}]}, "says neither `weight` nor `tokens`", "write one of them"),
        ({"blend": [{"text": "a", "weight": 1, "tokens": 5}]}, "says both `weight` and `tokens`", "write one of them"),
        (
            {"blend": [{"text": "a", "weight": 1}, {"text": "b", "tokens": 5}]},
            "mixes parts by `weight` with parts by `tokens`",
            "write one of the two",
        ),
    ],
)
def test_options_that_do_not_go_together(load: Load, keys: dict[str, Any], message: str, hint: str) -> None:
    from minitron.specs import SpecInvalid

    with pytest.raises(SpecInvalid) as caught:
        load(SMALL.replace("{data: {text: [a.txt]}, tok", f"{{data: {json.dumps(keys)}, tok"))
    (error,) = caught.value.errors
    assert message in error.message and hint in error.hint, str(error)


def test_defaults_follow_what_a_row_holds() -> None:
    assert source(jsonl="a").model_dump() == {"jsonl": ("a",), "text_field": "text", "on_error": "fail"}
    chat = source(jsonl="a", messages_field="m").model_dump()
    assert chat == {"jsonl": ("a",), "messages_field": "m", "train_on": "all", "on_error": "fail"}
    pairs = source(jsonl="a", prompt_field="p").model_dump()
    assert pairs["completion_field"] == "completion" and pairs["train_on"] == "all" and "text_field" not in pairs


def test_token_budgets_make_up_the_training(load: Load) -> None:
    from minitron.specs import SpecInvalid

    blend = "distill: {data: {blend: [{text: a.txt, tokens: 600M}, {text: b.txt, tokens: 400M}]}, tokens: 1B}"
    spec = SMALL.replace("distill: {data: {text: [a.txt]}, tokens: 1B}", blend)
    load(spec)
    with pytest.raises(
        SpecInvalid, match=r"the parts' `tokens` make 1B, and `distill\.tokens` is 2B; write `distill\.tokens"
    ):
        load(spec.replace("tokens: 1B", "tokens: 2B"))


def test_token_budgets_are_shares() -> None:
    parts = source(blend=[{"text": "a", "tokens": "300M"}, {"text": "b", "tokens": "100M"}]).blend
    assert parts is not None and [part.share for part in parts] == [3e8, 1e8]
    assert BlendPart.model_validate({"text": "a", "weight": 0.5}).share == 0.5


# --- hashes ---


def test_a_large_file_is_hashed_by_pieces_from_all_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.specs import data_files

    monkeypatch.setattr(data_files, "HASHED_WHOLE", 1 << 20)
    file, content = tmp_path / "a", bytearray(os.urandom(1 << 20) * 8)
    file.write_bytes(content)
    before = data_files.data_file_hash(file)
    assert before.startswith("sampled:") and data_files.data_file_hash(file) == before
    for place in (0, (len(content) - (64 << 10)) * 32 // 63, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        assert data_files.data_file_hash(file) != before
        content[place] ^= 1
    file.write_bytes(content[:-1])
    assert data_files.data_file_hash(file) != before
