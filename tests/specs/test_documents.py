"""Documents of every kind of source: found, hashed, read, and refused with what to do."""

from __future__ import annotations

import builtins
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs import WorkError
from minitron.specs.documents import (
    Conversation,
    DataSource,
    check_data,
    content_hash,
    data_files,
    iter_documents,
    resolve,
)
from minitron.specs.errors import Refused, located
from tests.specs.conftest import Load
from tests.specs.specimens import SMALL


def source(**keys: Any) -> DataSource:
    return DataSource.model_validate(keys)


def read(folder: Path, **keys: Any) -> list[Any]:
    return list(iter_documents(resolve(source(**keys), folder)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second\n\nstill second\n")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "deep" / "c.txt").write_text("third\r\nline\r\n\r\n \r\nanother\r\n")
    (tmp_path / "blank.txt").write_text(" \n\n")
    return tmp_path


# --- text ---


def test_a_text_file_is_a_document(corpus: Path) -> None:
    assert read(corpus, text=["*.txt"]) == ["first\n", "second\n\nstill second\n"]
    assert read(corpus, text=["**/*.txt"])[2] == "third\nline\n\n \nanother\n"


def test_a_line_or_a_paragraph_is_a_document(corpus: Path) -> None:
    assert read(corpus, text="deep/c.txt", document="line") == ["third", "line", "another"]
    assert read(corpus, text="deep/c.txt", document="paragraph") == ["third\nline", "another"]


@given(st.lists(st.text("ab ", min_size=1).filter(str.strip), min_size=1, max_size=6))
def test_paragraphs_come_back_whole(paragraphs: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_text("\n\n\n".join(paragraphs))
        assert read(Path(folder), text="a.txt", document="paragraph") == paragraphs
        assert read(Path(folder), text="a.txt", document="line") == paragraphs


def test_at_most_as_many_as_asked_for(corpus: Path) -> None:
    resolved = resolve(source(text=["**/*.txt"]), corpus)
    assert list(iter_documents(resolved, limit=2)) == ["first\n", "second\n\nstill second\n"]
    assert list(iter_documents(resolved, limit=0)) == []


def test_files_are_sorted_absolute_and_named_once(corpus: Path) -> None:
    resolved = resolve(source(text=["b.txt", "*.txt"]), corpus)
    assert resolved.text == tuple(str(corpus / name) for name in ("b.txt", "a.txt", "blank.txt"))
    assert resolve(resolved, Path("/elsewhere")) == resolved
    assert data_files(resolved) == [Path(name) for name in resolved.text or ()]


def test_brackets_may_be_part_of_a_file_s_name(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("found")
    assert read(tmp_path, text="part[1].txt") == ["found"]


def test_the_standard_library_is_a_corpus_that_every_machine_has(tmp_path: Path) -> None:
    resolved = resolve(source(text=["python-stdlib:held_out"]), tmp_path)
    assert resolved.text == ("python-stdlib:held_out",), "another folder on every machine, so it stays a word"
    assert len(list(iter_documents(resolved))) == len(data_files(resolved)) > 10
    train = data_files(source(text=["python-stdlib:train"]))
    assert not set(train) & set(data_files(resolved))


def test_all_patterns_that_name_nothing_are_said_at_once(corpus: Path) -> None:
    keys = {"text": ["gone.txt", "*.md", "a.txt", "deep", "~/x", "${HOME}/y"]}
    with pytest.raises(Refused) as caught:
        resolve(source(**keys), corpus, at="distill.data")
    assert [(error.path, error.message, error.hint) for error in caught.value.problems] == [
        ("distill.data.text.0", "there is no file `gone.txt`", f"paths are relative to {corpus}"),
        ("distill.data.text.1", "`*.md` matches no file", f"patterns are relative to {corpus}"),
        ("distill.data.text.3", "`deep` is a folder", "name the files in it, such as deep/**/*.txt"),
        ("distill.data.text.4", "`~/x` names no file", "write the path out: variables and `~` are not expanded"),
        ("distill.data.text.5", "`${HOME}/y` names no file", "write the path out: variables and `~` are not expanded"),
    ]


def test_missing_data_of_a_spec_is_said_at_its_places(load: Load, tmp_path: Path) -> None:
    held_out = "evaluate: {held_out: {blend: [{weight: 1, jsonl: c.jsonl}, {weight: 1, dataset: ./d}]}}\n"
    loaded = load(SMALL + held_out)
    assert [(error.line, error.column, error.path) for error in located(check_data(loaded), loaded)] == [
        (4, 28, "importance.data.text.0"),
        (5, 25, "distill.data.text.0"),
        (6, 50, "evaluate.held_out.blend.0.jsonl.0"),
        (6, 81, "evaluate.held_out.blend.1.dataset"),
    ]
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "d").mkdir()
    assert check_data(loaded) == []


def test_a_folder_of_benchmarks_that_is_not_there(load: Load, tmp_path: Path) -> None:
    loaded = load(SMALL + "evaluate: {suite: [hellaswag], data_dir: bench/}\n")
    (tmp_path / "a.txt").write_text("text")
    (error,) = located(check_data(loaded), loaded)
    assert (error.line, error.column, error.path) == (6, 42, "evaluate.data_dir")
    assert error.message == "there is no folder `bench/`" and "paths are relative to" in error.hint
    (tmp_path / "bench").mkdir()
    assert check_data(loaded) == []


def test_a_source_without_a_document_is_refused(corpus: Path) -> None:
    with pytest.raises(WorkError, match=r"there is no document in `text: .*blank\.txt`"):
        read(corpus, text="blank.txt")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(WorkError, match=r"a\.txt: is not UTF-8 text"):
        read(tmp_path, text="a.txt")


def test_a_file_that_went_away_is_refused(corpus: Path) -> None:
    resolved = resolve(source(text="a.txt"), corpus)
    (corpus / "a.txt").unlink()
    for action in (content_hash, lambda data: list(iter_documents(data))):
        with pytest.raises(WorkError, match=r"a\.txt: cannot be read \(No such file"):
            action(resolved)


# --- jsonl and messages ---


def rows(path: Path, *values: object) -> None:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n\n")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_row_is_a_document(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"text": "one", "body": "1"}, {"text": "  "}, {"text": "two", "body": "2"})
    assert read(tmp_path, jsonl="a.jsonl") == ["one", "two"]
    rows(tmp_path / "b.jsonl", {"body": "1"}, {"body": "2"})
    assert read(tmp_path, jsonl=["b.jsonl"], text_field="body") == ["1", "2"]


def test_messages_are_handed_on_as_they_are(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"chat": CHAT})
    assert read(tmp_path, jsonl="a.jsonl", messages_field="chat") == [Conversation(CHAT)]


@pytest.mark.parametrize(
    ("line", "keys", "message"),
    [
        ("{", {}, r"a\.jsonl:2: is not JSON"),
        ("[" * 100_000, {}, r"a\.jsonl:2: is not JSON"),
        ("[1]", {}, r"a\.jsonl:2: is not an object with a field `text`"),
        (
            '{"txt": "a"}',
            {},
            "has no field `text`; did you mean `txt`. there is `txt`: write one of them as `text_field`",
        ),
        ("{}", {}, "has no field `text`; there is nothing"),
        (
            '{"id": 1, "messages": []}',
            {},
            "has no field `text`, and has `messages`: write `messages_field: messages` for",
        ),
        ('{"text": 3}', {}, "`text` is not text; name the field that holds the text as `text_field`"),
        ('{"text": "a"}', {"messages_field": "text"}, "`text` is not a list of messages such as"),
        ('{"text": [{}]}', {"messages_field": "text"}, "`text` is not a list of messages such as"),
        ('{"chat": "a"}', {"messages_field": "text"}, "there is `chat`: write one of them as `messages_field`"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, line: str, keys: dict[str, str], message: str) -> None:
    good = {"text": CHAT if keys else "fine"}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + line)
    with pytest.raises(WorkError, match=message):
        read(tmp_path, jsonl="a.jsonl", **keys)


# --- parquet and data sets ---


def parquet(path: Path, **columns: list[Any]) -> None:
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)


def test_a_parquet_row_is_a_document(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(3000)]
    parquet(tmp_path / "a.parquet", text=texts, other=list(range(3000)))
    parquet(tmp_path / "b.parquet", text=["last"])
    assert read(tmp_path, parquet="*.parquet") == [*texts, "last"]


def test_parquet_messages(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", chat=[CHAT])
    assert read(tmp_path, parquet="a.parquet", messages_field="chat") == [Conversation(CHAT)]


TOOLS = [
    [
        {"role": "user", "content": "how warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {"place": "here"}}]},
        {"role": "tool", "content": "12", "name": "weather"},
    ],
    [{"role": "user", "content": "hi", "tool_calls": [{"name": "clock", "arguments": {"zone": "utc"}}]}],
]


@pytest.mark.parametrize("kind", ["parquet", "dataset", "jsonl"])
def test_messages_have_the_keys_that_were_written_whatever_they_are_stored_in(tmp_path: Path, kind: str) -> None:
    """Columns give each message, and each struct in it, the keys of all others with null."""
    datasets = pytest.importorskip("datasets", reason="data sets need datasets")
    if kind == "parquet":
        parquet(tmp_path / "data", chat=TOOLS)
    elif kind == "dataset":
        datasets.Dataset.from_dict({"chat": TOOLS}).save_to_disk(tmp_path / "data")
    else:
        rows(tmp_path / "data", *({"chat": chat} for chat in TOOLS))
    assert read(tmp_path, **{kind: "data"}, messages_field="chat") == [Conversation(chat) for chat in TOOLS]


def test_wrong_parquet_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", body=["x"])
    with pytest.raises(WorkError, match="has no field `text`; there is `body`"):
        read(tmp_path, parquet="a.parquet")
    parquet(tmp_path / "b.parquet", text=[1, 2])
    with pytest.raises(WorkError, match="row 1: `text` is not text"):
        read(tmp_path, parquet="b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(WorkError, match=r"c\.parquet: is not a whole parquet file"):
        read(tmp_path, parquet="c.parquet")


def test_a_saved_data_set_is_read_by_its_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets need datasets")
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", "b"]})})
    whole.save_to_disk(tmp_path / "saved")
    whole["train"].save_to_disk(tmp_path / "one")
    assert read(tmp_path, dataset="saved") == ["a", "b"] == read(tmp_path, dataset="./one")
    with pytest.raises(WorkError, match="has no split `test`; write one of `train`"):
        read(tmp_path, dataset="saved", split="test")
    with pytest.raises(WorkError, match="has no field `body`; there is `text`: write one of them as `text_field`"):
        read(tmp_path, dataset="saved", text_field="body")


def test_a_folder_of_data_files_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets need datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    rows(tmp_path / "folder" / "train.jsonl", {"text": "one"}, {"text": "two"})
    assert read(tmp_path, dataset="folder") == ["one", "two"]


def test_a_data_set_can_be_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="data sets need datasets")
    (tmp_path / "folder").mkdir()
    rows(tmp_path / "folder" / "train.jsonl", {"text": "one"}, {"text": "two"})
    assert read(tmp_path, dataset="folder", streaming=True) == ["one", "two"]


def test_a_stream_that_breaks_off_says_where_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets need datasets")

    def stream(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        yield {"text": "two"}
        raise RuntimeError("the peer closed the connection\nlong details")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    with pytest.raises(
        WorkError, match=r"org/name cannot be read after 2 rows \(the peer closed the connection\); check"
    ):
        read(tmp_path, dataset="org/name", streaming=True)


def test_a_data_set_that_is_not_to_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets need datasets")

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong details")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(WorkError, match=r"org/name cannot be loaded \(Couldn't reach the Hub\); .* without a network"):
        read(tmp_path, dataset="org/name")


@pytest.mark.parametrize(("keys", "module"), [({"parquet": "a.x"}, "pyarrow"), ({"dataset": "a/b"}, "datasets")])
def test_a_package_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], module: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *rest)

    (tmp_path / "a.x").write_text("x")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WorkError, match=r"pip install 'minitron\[datasets\]'"):
        read(tmp_path, **keys)


# --- blends ---


def test_a_blend_keeps_its_proportions_and_leaves_nothing_out(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", *({"text": f"a{number:03d}"} for number in range(300)))
    rows(tmp_path / "b.jsonl", *({"text": f"b{number:03d}"} for number in range(60)))
    documents = read(tmp_path, blend=[{"weight": 3, "jsonl": "a.jsonl"}, {"weight": 1, "jsonl": "b.jsonl"}])
    for length in range(20, len(documents), 50):
        share = sum(text[0] == "a" for text in documents[:length]) / length
        assert abs(share - 0.75) < 1.5 / length
    assert {*documents} == {f"a{number:03d}" for number in range(300)} | {f"b{number:03d}" for number in range(60)}
    assert documents.count("a000") == 1 and documents.count("b000") == 2, "the shorter source begins again"


def test_a_blend_weighs_text_and_not_documents(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 1000)
    rows(tmp_path / "short.jsonl", *({"text": "y" * 10} for _ in range(200)))
    stream = read(tmp_path, blend=[{"weight": 1, "text": "long.txt"}, {"weight": 1, "jsonl": "short.jsonl"}])
    characters = [sum(len(text) for text in stream if text[0] == letter) for letter in "xy"]
    assert abs(characters[0] - characters[1]) <= 1000, "no further apart than the longest document"
    assert characters[1] == 2000


def test_an_empty_part_of_a_blend_is_refused(corpus: Path) -> None:
    with pytest.raises(WorkError, match="there is no document in"):
        read(corpus, blend=[{"weight": 1, "text": "a.txt"}, {"weight": 1, "text": "blank.txt"}])


# --- hashes ---


def test_a_hash_follows_names_contents_and_options_and_not_the_folder(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("one")
        (tmp_path / name / "b.txt").write_text("two")

    def digest(folder: str, **keys: Any) -> str:
        return content_hash(resolve(source(**({"text": "*.txt"} | keys)), tmp_path / folder))

    base = digest("here")
    assert digest("there") == base == digest("here", text=["a.txt", "b.txt"])
    different = [
        digest("here", text=["b.txt", "a.txt"]),
        digest("here", text="a.txt"),
        digest("here", document="line"),
        content_hash(resolve(source(blend=[{"weight": 1, "text": "*.txt"}]), tmp_path / "here")),
        content_hash(resolve(source(blend=[{"weight": 2, "text": "*.txt"}]), tmp_path / "here")),
    ]
    (tmp_path / "there" / "b.txt").write_text("three")
    different.append(digest("there"))
    (tmp_path / "here" / "b.txt").rename(tmp_path / "here" / "c.txt")
    different.append(digest("here"))
    assert len({base, *different}) == len(different) + 1
    assert all(one != other for one, other in itertools.combinations(different, 2))


def test_how_much_is_read_does_not_change_the_hash_of_the_data(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    hashes = set()
    for samples in (8, 16):
        data = load(SMALL, f"importance.data.samples={samples}").spec.importance.data
        assert data is not None
        hashes.add(content_hash(resolve(data, tmp_path)))
    assert len(hashes) == 1


def test_a_data_set_folder_is_hashed_by_its_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows(tmp_path / name / "train.jsonl", {"text": "a"})
    first, second = (content_hash(resolve(source(dataset=name), tmp_path)) for name in ("one", "two"))
    assert first == second
    rows(tmp_path / "two" / "train.jsonl", {"text": "b"})
    assert content_hash(resolve(source(dataset="two"), tmp_path)) != first
    assert content_hash(source(dataset="org/a")) != content_hash(source(dataset="org/b"))
    assert content_hash(source(dataset="org/a")) != content_hash(source(dataset="org/a", revision="abc"))
