"""Finds faults of data in seconds, before hours are spent: reads small sources completely and samples large ones."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from minitron.specs.data import DataSource, Source
from minitron.specs.data_files import data_files
from minitron.specs.documents.json_array import elements
from minitron.specs.documents.kinds import Tally
from minitron.specs.documents.megatron import open_megatron
from minitron.specs.documents.opening import BLOCK, COMPRESSED, check_utf8, not_utf8, open_bytes
from minitron.specs.documents.readers import describe, is_array, json_line, parquet_rows, read_source
from minitron.specs.documents.rows import RowReader
from minitron.specs.documents.shares import count_sides, places
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.one_line import plural

WHOLE_BYTES = 8 << 20
"""A source up to this size is read whole: a few tenths of a second."""

PLACES = 16
"""Places in a larger file that are looked at, from its beginning to near its end."""

SAMPLED_ROWS = 32
"""Rows that are read at each place."""

SAMPLED_FILES = 128
"""The most files that are looked into, spread over all and with the first and the last among them."""


def check_readable(source: Source) -> None:
    """Checks that a resolved source has a document and that its files have the stated form and columns, in the rows
    that are sampled. WorkError for the first fault.

    Data sets of the Hub are not read, because that needs a network. Under `on_error: skip` only a source without any
    document is a fault.
    """
    if isinstance(source, DataSource) and source.blend is not None:
        for part in source.blend:
            check_readable(part)
        return
    if source.dataset is not None or (source.parquet is not None and find_spec("pyarrow") is None):
        return
    files = data_files(source)
    small = source.on_error != "skip" and sum(_size(file) for file in files) <= WHOLE_BYTES
    if not small and source.on_error != "skip":
        for file in _spread(files):
            _look_into(file, source)
    pieces = read_source(source, Tally())
    if next(pieces, None) is None:
        raise WorkError(f"there is no document in {describe(source)}; name other data in the spec")
    if small:
        for _ in pieces:
            pass


def check_share(source: Source, share: float, *, held_out: bool = True) -> None:
    """Checks that a resolved source (no blend) has documents above a share, to be trained on, and below it, where it is one
    that documents are `held_out` of. UsageError where it has none, which is told in a second for small sources, and not at
    all for data sets of the Hub. WorkError where a document cannot be read.
    """
    if source.dataset is not None or (source.parquet is not None and find_spec("pyarrow") is None):
        return
    sides = count_sides(places(read_source(source, Tally())), share)
    if sides.all and not (sides.above and (sides.below or not held_out)):
        side = "trained on" if sides.above == 0 else "held out"
        more = (
            "`document: paragraph` or `line` makes more of a text; "
            if source.text and source.document == "file"
            else ""
        )
        raise UsageError(
            f"of {plural(sides.below + sides.above, 'document')} in {describe(source)} none would be {side}: whole documents "
            f"are chosen, by a hash; {more}write another share, or name held-out text of its own"
        )


def _spread(files: list[Path]) -> list[Path]:
    count = min(len(files), SAMPLED_FILES)
    return [files[index * (len(files) - 1) // max(1, count - 1)] for index in range(count)]


def _size(file: Path) -> int:
    """Returns the size of a file, a lower bound of what it holds; 0 leaves an unreadable file to the reader."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _look_into(file: Path, source: Source) -> None:
    if source.megatron is not None:
        open_megatron(file)
    elif source.parquet is not None:
        reader = RowReader(source, Tally())
        for row, where in parquet_rows(file, reader, limit=SAMPLED_ROWS):
            reader.read(row, where)
    elif source.jsonl is not None:
        _look_into_json(file, source)
    elif _size(file) <= BLOCK:
        check_utf8(file)
    else:
        _look_into_text(file)


def _look_into_text(file: Path) -> None:
    with open_bytes(file) as handle:
        for block in _blocks(handle, file):
            try:
                # A block may begin and end inside a character.
                trimmed = block.lstrip(bytes(range(0x80, 0xC0))) if handle.tell() > len(block) else block
                codecs.getincrementaldecoder("utf-8")().decode(trimmed)
            except UnicodeDecodeError as error:
                raise not_utf8(str(file), error) from None


def _look_into_json(file: Path, source: Source) -> None:
    reader = RowReader(source, Tally())
    with open_bytes(file) as handle:
        if is_array(handle):
            for row, where in itertools.islice(elements(handle, str(file)), SAMPLED_ROWS):
                reader.read(row, where)
            return
        for number, line in enumerate(itertools.islice(handle, SAMPLED_ROWS), 1):
            if line.strip():
                where = f"{file}:{number}"
                reader.read(json_line(line.removeprefix(codecs.BOM_UTF8), where), where)
        if file.suffix in COMPRESSED:
            return
        for place in _places(file):
            handle.seek(place)
            handle.readline()  # the rest of a line
            for _ in range(SAMPLED_ROWS):
                where = f"{file}: the line at byte {handle.tell()}"
                if (line := handle.readline()).strip():
                    reader.read(json_line(line, where), where)


def _places(file: Path) -> list[int]:
    size = _size(file)
    return [size * place // PLACES for place in range(1, PLACES)]


def _blocks(handle: IO[bytes], file: Path) -> Iterator[bytes]:
    yield handle.read(BLOCK)
    if file.suffix not in COMPRESSED:
        for place in _places(file):
            handle.seek(place)
            yield handle.read(BLOCK // PLACES)
