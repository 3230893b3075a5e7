"""Reads the files of a source, in an order that depends on nothing but the files.

A document that cannot be read ends the reading under `on_error: fail`; under `skip` it is counted and left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minitron.specs.data import STDLIB_PREFIX, Source
from minitron.specs.data_files import stdlib, unreadable
from minitron.specs.documents.json_array import elements
from minitron.specs.documents.kinds import Document, Piece, Tally, TokenIds, size_of
from minitron.specs.documents.megatron import read_megatron
from minitron.specs.documents.opening import (
    blocks,
    check_utf8,
    not_utf8,
    open_bytes,
    open_text,
    packages_missing,
)
from minitron.specs.documents.rows import RowReader, no_field
from minitron.specs.documents.shares import chosen
from minitron.specs.errors import WorkError

_PARQUET_ROWS = 1024  # rows in memory at one time
_BOM = b"\xef\xbb\xbf"


def read_source(source: Source, tally: Tally) -> Iterator[Piece]:
    """Yields the documents of one resolved source (no blend) that are not blank, and counts them in `tally`."""
    match source.kind:
        case "text":
            pieces = _text(source, tally)
        case "jsonl":
            pieces = _rows(_json_rows(source, tally), source, tally)
        case "parquet":
            pieces = _rows(_parquet_rows(source, tally), source, tally)
        case "dataset":
            from minitron.specs.documents.hub import dataset_rows

            pieces = _rows(dataset_rows(source), source, tally)
        case _:
            assert source.megatron is not None
            pieces = itertools.chain.from_iterable(read_megatron(Path(entry)) for entry in source.megatron)
    if source.only is not None or source.leave_out is not None:
        pieces = chosen(pieces, source)
    by_line = source.kind == "jsonl"  # counted where its lines are read
    for piece in pieces:
        tally.documents += piece.ends
        tally.bytes += 0 if by_line else _bytes(piece.content)
        yield piece


def _bytes(document: Document) -> int:
    if isinstance(document, TokenIds):
        return len(document.ids) * (document.ids.itemsize if hasattr(document.ids, "itemsize") else 4)
    return len(document.encode()) if isinstance(document, str) and not document.isascii() else size_of(document)


# --- text ---


def _text(source: Source, tally: Tally) -> Iterator[Piece]:
    assert source.text is not None
    for entry in source.text:
        for file in stdlib(entry) if entry.startswith(STDLIB_PREFIX) else [Path(entry)]:
            skips = source.on_error == "skip"
            try:
                if skips and source.document == "file":
                    # Before any part of it is yielded: half a document must not be.
                    check_utf8(file)
                with tally.reading(file), open_text(file, marked=skips) as handle:
                    if source.document == "file":
                        yield from _file(blocks(handle), str(file), tally)
                    else:
                        parts = (_lines if source.document == "line" else _paragraphs)(handle, str(file), tally)
                        yield from _readable(parts, tally) if skips else parts
            except WorkError as error:
                if not skips:
                    raise
                tally.skip(str(error))


def _readable(pieces: Iterator[Piece], tally: Tally) -> Iterator[Piece]:
    """Leaves out the pieces that hold bytes which are not UTF-8, as `open_text` marks them; behind the first, those with NUL
    as well: most lines of a file in UTF-16 would be UTF-8 otherwise.
    """
    foreign = False
    for piece in pieces:
        assert isinstance(piece.content, str)
        try:
            piece.content.encode()
            readable = not (foreign and "\0" in piece.content)
        except UnicodeEncodeError:
            foreign, readable = True, False
        if readable:
            yield piece
        else:
            tally.skip(f"{piece.where}: is not UTF-8 text; convert it, or leave it out of the data")


def _lines(handle: Iterable[str], where: str, tally: Tally) -> Iterator[Piece]:
    for number, line in enumerate(handle, 1):
        if line.strip():
            yield Piece(line.rstrip("\n"), f"{where}:{number}")
        else:
            tally.empty += 1


def _paragraphs(handle: Iterable[str], where: str, _: Tally) -> Iterator[Piece]:
    numbered = enumerate(handle, 1)
    for blank, group in itertools.groupby(numbered, key=lambda one: not one[1].strip()):
        if not blank:
            lines = list(group)
            yield Piece("".join(line for _, line in lines).rstrip("\n"), f"{where}:{lines[0][0]}")


def _file(parts: Iterator[str], where: str, tally: Tally) -> Iterator[Piece]:
    """Yields a whole file as one document, part by part; blank text before the first word belongs to the document."""
    blank: list[str] = []
    for part in parts:
        if part.strip():
            break
        blank.append(part)
    else:
        tally.empty += 1
        return
    before, begins = "".join([*blank, part]), True
    for part in parts:
        yield Piece(before, where, begins=begins, ends=False)
        before, begins = part, False
    yield Piece(before, where, begins=begins)


# --- rows ---


def _rows(rows: Iterable[tuple[Any, str]], source: Source, tally: Tally) -> Iterator[Piece]:
    reader = RowReader(source, tally)
    for row, where in rows:
        try:
            document = reader.read(row, where)
        except WorkError as error:
            if source.on_error != "skip":
                raise
            tally.skip(str(error))
            continue
        if document is None or (isinstance(document, str) and not document.strip()):
            tally.empty += 1
        else:
            yield Piece(document, where, lenient=source.on_error == "skip")


def _json_rows(source: Source, tally: Tally) -> Iterator[tuple[Any, str]]:
    assert source.jsonl is not None
    for entry in source.jsonl:
        file = Path(entry)
        try:
            with tally.reading(file), open_bytes(file) as handle:
                if is_array(handle):
                    yield from elements(handle, entry)
                else:
                    yield from _json_lines(handle, source, tally, entry)
        except WorkError as error:
            if source.on_error != "skip":
                raise
            tally.skip(str(error))


def is_array(handle: Any) -> bool:
    """Checks whether a file is one JSON array: a line of JSON Lines is an object, so it does not begin with a bracket."""
    while first := handle.peek(1):
        rest = first.removeprefix(_BOM).lstrip()
        if rest:
            return bool(rest[:1] == b"[")
        handle.read(len(first))
    return False


def _json_lines(handle: Iterable[bytes], source: Source, tally: Tally, where: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(handle, 1):
        tally.bytes += len(line)
        if not line.strip():
            continue
        try:
            yield json_line(line.removeprefix(_BOM) if number == 1 else line, f"{where}:{number}"), f"{where}:{number}"
        except WorkError as error:
            if source.on_error != "skip":
                raise
            tally.skip(str(error))


def json_line(line: bytes, where: str) -> Any:
    """Parses the JSON value on one line. WorkError if the line holds none."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except (ValueError, RecursionError):
        raise WorkError(f"{where}: is not JSON; each line must hold one JSON object") from None


def _parquet_rows(source: Source, tally: Tally) -> Iterator[tuple[Any, str]]:
    assert source.parquet is not None
    reader = RowReader(source, tally)
    for entry in source.parquet:
        try:
            with tally.reading(file := Path(entry)):
                yield from parquet_rows(file, reader)
        except WorkError as error:
            if source.on_error != "skip":
                raise
            tally.skip(str(error))


def parquet_rows(file: Path, reader: RowReader, limit: int | None = None) -> Iterator[tuple[Any, str]]:
    """Yields the needed columns of each row of a parquet file. WorkError for another format or a missing column."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise packages_missing("reading parquet files") from None
    try:
        with ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            roots = {name: name if name in names else name.split(".")[0] for name in reader.columns}
            if roots[reader.name] not in names:
                raise no_field(str(file), reader.name, reader.option, names)
            columns = sorted({root for root in roots.values() if root in names})
            numbers = itertools.count(1)
            for batch in opened.iter_batches(batch_size=min(limit or _PARQUET_ROWS, _PARQUET_ROWS), columns=columns):
                for row in batch.to_pylist():
                    number = next(numbers)
                    if limit is not None and number > limit:
                        return
                    yield row, f"{file} row {number}"
    except OSError as error:
        raise unreadable(file, error) from None
    except ArrowException as error:
        raise WorkError(f"{file}: is not a whole parquet file ({error}); write it again, or leave it out") from None


def describe(source: Source) -> str:
    """Returns a source as messages name it: its kind and the first of its files."""
    value = getattr(source, source.kind)
    shown = ", ".join(str(item) for item in value[:3]) if isinstance(value, tuple) else str(value)
    return f"`{source.kind}: {shown}{', ...' if isinstance(value, tuple) and len(value) > 3 else ''}`"


def documents_of(pieces: Iterable[Piece]) -> Iterator[Document]:
    """Joins the pieces of long texts and yields whole documents."""
    kept: list[str] = []
    for piece in pieces:
        if piece.begins and piece.ends:
            yield piece.content
            continue
        assert isinstance(piece.content, str)
        kept.append(piece.content)
        if piece.ends:
            yield "".join(kept)
            kept = []
