"""Reads the documents of a data source, one after the other, in an order that depends on nothing but the files.

A document is a string, or for chat data a list of messages, which whoever holds a tokenizer renders with its template.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from minitron.specs.data import STDLIB_PREFIX, BlendPart, DataSource, Source
from minitron.specs.data_files import check_data, content_hash, data_files, resolve, stdlib, unreadable
from minitron.specs.errors import WorkError
from minitron.specs.suggest import closest

__all__ = ["DataSource", "Document", "check_data", "content_hash", "data_files", "iter_documents", "resolve"]

Message: TypeAlias = dict[str, Any]
Document: TypeAlias = str | list[Message]

_PARQUET_ROWS = 1024  # rows in memory at one time


def iter_documents(source: Source, *, limit: int | None = None) -> Iterator[Document]:
    """The documents of a resolved source that are not blank, at most `limit` of them.

    WorkError for a file that cannot be read as what the source says it is, and where there is no document at all.
    """
    documents = (document for document in _documents(source) if not isinstance(document, str) or document.strip())
    first = next(documents, None)
    if first is None:
        raise WorkError(f"there is no document in {_describe(source)}; name other data in the spec")
    return itertools.islice(itertools.chain([first], documents), limit)


def check_readable(source: Source) -> None:
    """Reads resolved text or JSON lines as far as to see that there is a document. Errors as for `iter_documents`.

    Of other kinds nothing is read: they need packages or a network.
    """
    if isinstance(source, DataSource) and source.blend is not None:
        for part in source.blend:
            check_readable(part)
    elif source.text is not None:
        # Line by line: a document may be larger than the memory.
        if not any(line.strip() for file in data_files(source) for line in _lines(file)):
            raise WorkError(f"there is no document in {_describe(source)}; name other data in the spec")
    elif source.jsonl is not None:
        next(iter_documents(source, limit=1))


def _describe(source: Source) -> str:
    value = getattr(source, source.kind)
    shown = ", ".join(str(item) for item in value[:3]) if isinstance(value, tuple) else str(value)
    return f"`{source.kind}: {shown}{', ...' if isinstance(value, tuple) and len(value) > 3 else ''}`"


def _documents(source: Source) -> Iterator[Document]:
    match source.kind:
        case "text":
            return _text(source)
        case "jsonl":
            return _jsonl(source)
        case "parquet":
            return _parquet(source)
        case "dataset":
            return _hub(source)
        case _:
            assert isinstance(source, DataSource) and source.blend is not None
            return _blended(source.blend)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as handle:
            yield from handle
    except OSError as error:
        raise unreadable(file, error) from None
    except UnicodeDecodeError as error:
        raise WorkError(
            f"{file}: is not UTF-8 text ({error.reason}); convert it, or leave it out of the data"
        ) from None


def _text(source: Source) -> Iterator[str]:
    assert source.text is not None
    for entry in source.text:
        for file in stdlib(entry) if entry.startswith(STDLIB_PREFIX) else [Path(entry)]:
            lines = _lines(file)
            if source.document == "line":
                yield from (line.rstrip("\n") for line in lines)
            elif source.document == "paragraph":
                for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
                    if not blank:
                        yield "".join(group).rstrip("\n")
            else:
                yield "".join(lines)


def _jsonl(source: Source) -> Iterator[Document]:
    assert source.jsonl is not None
    for entry in source.jsonl:
        for number, line in enumerate(_lines(Path(entry)), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise WorkError(f"{entry}:{number}: is not JSON; each line must hold one JSON object") from None
                yield _field(row, source, f"{entry}:{number}")


def _field(row: Any, source: Source, where: str) -> Document:
    """The document in one row. WorkError, which says what the row has instead, where it is not there."""
    name = source.messages_field or source.text_field
    option = "messages_field" if source.messages_field else "text_field"
    if not isinstance(row, dict):
        raise WorkError(f"{where}: is not an object with a field `{name}`; each document must be one")
    if name not in row:
        raise _no_field(where, str(name), option, row)
    value = row[name]
    if source.messages_field is None:
        if isinstance(value, str):
            return value
        raise WorkError(f"{where}: `{name}` is not text; name the field that holds the text as `{option}`")
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return [_given(message) for message in value]
    wanted = 'a list of messages such as {"role": "user", "content": "..."}'
    raise WorkError(f"{where}: `{name}` is not {wanted}; name the field that is as `{option}`")


def _given(message: Message) -> Message:
    """A message without the keys that only other messages have. Columns of parquet files and data sets give every message all
    keys, with null for those that it does not have, and templates ask whether a key is there. A null `content` is said
    outright: beside tool calls there is none."""
    return {key: _pruned(value) for key, value in message.items() if value is not None or key == "content"}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _no_field(where: str, name: str, option: str, known: Iterable[str]) -> WorkError:
    nearest = closest(name, known)
    meant = f"did you mean `{nearest}`? " if nearest else ""
    there = ", ".join(f"`{key}`" for key in known) or "nothing"
    return WorkError(f"{where}: has no field `{name}`; {meant}there is {there}: write one of them as `{option}`")


def _extra_missing(what: str) -> WorkError:
    return WorkError(f"{what} needs packages that are not installed; run: pip install 'minitron[datasets]'")


def _parquet(source: Source) -> Iterator[Document]:
    assert source.parquet is not None
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _extra_missing("reading parquet files") from None
    name = str(source.messages_field or source.text_field)
    for entry in source.parquet:
        try:
            with ParquetFile(entry) as file:
                if name not in file.schema_arrow.names:
                    option = "messages_field" if source.messages_field else "text_field"
                    raise _no_field(entry, name, option, file.schema_arrow.names)
                rows = itertools.count(1)
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[name]):
                    for row in batch.to_pylist():
                        yield _field(row, source, f"{entry} row {next(rows)}")
        except OSError as error:
            raise unreadable(Path(entry), error) from None
        except ArrowException as error:
            raise WorkError(
                f"{entry}: is not a whole parquet file ({error}); write it again, or leave it out"
            ) from None


def _hub(source: Source) -> Iterator[Document]:
    assert source.dataset is not None
    where = f"data set {source.dataset}"
    for number, row in enumerate(_rows(source, _load_dataset(source)), 1):
        yield _field(row, source, f"{where} row {number}")


def _rows(source: Source, loaded: Iterable[Any]) -> Iterator[Any]:
    """The rows of a data set, which streaming fetches as they are read."""
    rows, read = iter(loaded), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in `_load_dataset`
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise WorkError(
                f"the data set {source.dataset} cannot be read after {read} rows ({reason}); check the network and run "
                "the command again, or write a folder that holds the data"
            ) from None
        read += 1
        yield row


def _load_dataset(source: Source) -> Iterable[Any]:
    assert source.dataset is not None and source.split is not None
    try:
        import datasets
    except ImportError:
        raise _extra_missing("reading data sets") from None
    folder = Path(source.dataset)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            loaded: Any = datasets.load_from_disk(source.dataset)
        else:
            loaded = datasets.load_dataset(
                source.dataset,
                source.subset,
                split=None if folder.is_absolute() else source.split,
                revision=source.revision,
                streaming=bool(source.streaming),
            )
    except (
        Exception
    ) as error:  # the library raises a dozen kinds, from several packages, for one thing: it is not to be had
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WorkError(
            f"the data set {source.dataset} cannot be loaded ({reason}); check its name, `subset`, `split` and "
            "`revision`, and the network; without a network, write a folder that holds it"
        ) from None
    if isinstance(loaded, dict):
        if source.split not in loaded:
            there = ", ".join(f"`{split}`" for split in loaded)
            raise WorkError(f"the data set {source.dataset} has no split `{source.split}`; write one of {there}")
        loaded = loaded[source.split]
    return loaded  # type: ignore[no-any-return]


def _blended(parts: tuple[BlendPart, ...]) -> Iterator[Document]:
    """Documents of several sources, so that the characters read of each stay in proportion to its weight.

    It ends when every source was read once; one that ends earlier begins again, so the proportions hold to the end.
    """
    streams = [iter_documents(part) for part in parts]
    read = [0.0] * len(parts)
    unfinished = set(range(len(parts)))
    while unfinished:
        index = min(range(len(parts)), key=lambda one: (read[one] / parts[one].weight, one))
        document = next(streams[index], None)
        if document is None:
            unfinished.discard(index)
            streams[index] = iter_documents(parts[index])
            continue
        read[index] += len(document) if isinstance(document, str) else sum(len(str(item)) for item in document)
        yield document
