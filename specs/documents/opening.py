"""Opens data files: regular files only, compressed or not, as bytes or as text in blocks that end with a line."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minitron.specs.data_files import unreadable
from minitron.specs.errors import WorkError, first_line

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

BLOCK = 1 << 18
"""Characters of a text that are in memory at one time."""

_CUT = re.compile(r"(?<=\n)(?=[A-Za-z])")
"""The places where a text may be cut in two: behind a line break, before a line that begins with a letter. Most
tokenizers begin a new word there; those that do not are given the pieces joined (`specs.encoding.cuts`)."""


def packages_missing(what: str) -> WorkError:
    return WorkError(f"{what} needs packages that are not installed; run: pip install 'minitron[datasets]'")


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file and decompresses it by its file name extension. WorkError for a file that cannot be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise WorkError(f"{file}: is not a regular file; data is read several times, so write it to one")
        with _decompressed(file) as handle:
            yield handle
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from None
    except OSError as error:
        if error.errno is None:  # pyarrow and bz2 say so of contents
            raise _damaged(file, error) from None
        raise unreadable(file, error) from None
    except Exception as error:
        if type(error).__name__ == "LZMAError":
            raise _damaged(file, error) from None
        raise


def _damaged(file: Path, error: Exception) -> WorkError:
    reason = first_line(error)
    return WorkError(f"{file}: is not a whole {file.suffix} file ({reason}); write it again, or leave it out")


def _decompressed(file: Path) -> IO[bytes]:
    match file.suffix:
        case ".gz":
            return gzip.open(file, "rb")  # type: ignore[return-value]
        case ".bz2":
            import bz2

            return bz2.open(file, "rb")
        case ".xz":
            import lzma

            return lzma.open(file, "rb")
        case ".zst":
            try:
                import pyarrow
            except ImportError:
                raise packages_missing("reading .zst files") from None
            stream: Any = pyarrow.input_stream(str(file), compression="zstd")
            return io.BufferedReader(stream, BLOCK)
        case _:
            return file.open("rb")


@contextmanager
def open_text(file: Path, *, marked: bool = False) -> Iterator[IO[str]]:
    """Opens a file as text: UTF-8 without byte order mark, every line ended by \n. WorkError for other encodings; with
    `marked`, a byte that is none of UTF-8 is a lone surrogate in the text."""
    with open_bytes(file) as handle:
        try:
            yield io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape" if marked else "strict")
        except UnicodeDecodeError as error:
            raise not_utf8(str(file), error) from None


def not_utf8(where: str, error: UnicodeDecodeError) -> WorkError:
    return WorkError(f"{where}: is not UTF-8 text ({error.reason}); convert it, or leave it out of the data")


def check_utf8(file: Path) -> None:
    """Reads a whole text file. WorkError if it cannot be read to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(file) as handle:
        try:
            while block := handle.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise not_utf8(str(file), error) from None


def blocks(handle: IO[str]) -> Iterator[str]:
    """Yields the text of a file in pieces of about BLOCK characters, each but the last ending where a text may be cut."""
    kept: list[str] = []
    while block := handle.read(BLOCK):
        if not kept:
            kept.append(block)
            continue
        # The end of what was kept belongs to the search: a cut needs to see both lines.
        end = kept[-1][-1:]
        found = _CUT.search(end + block)
        if found is None:
            kept.append(block)
            continue
        place = found.start() - len(end)
        yield "".join([*kept, block[:place]])
        kept = [block[place:]] if place < len(block) else []
    if kept:
        yield "".join(kept)


def cut(text: str) -> list[str]:
    """Cuts a long text into the pieces that `blocks` would yield."""
    return [text] if len(text) <= 2 * BLOCK else list(blocks(io.StringIO(text)))
