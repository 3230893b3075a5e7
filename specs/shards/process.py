"""The process that tokenizes while a training runs: `python -m minitron.specs.shards.process` reads a request from stdin,
writes shards, and tells on stdout what there is to say.

The request is a line of JSON. Stdin stays open for as long as the training lives: its end is the end of this process, so
that a training that was killed leaves nothing that goes on writing. A stream that another process is writing is left to it,
and gone on with if that process ends; no lock is held while waiting for another, so that no two wait for each other.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from minitron.specs.data import BlendPart, DataSource, Source
from minitron.specs.encoding.encoder import Encoder
from minitron.specs.encoding.pool import Pool, cores
from minitron.specs.encoding.recipe import EncodingRecipe
from minitron.specs.errors import MinitronError, UsageError, first_line
from minitron.specs.locks import only_one
from minitron.specs.one_line import plural
from minitron.specs.progress import Progress, Silent
from minitron.specs.shards.growing import GrowingStream
from minitron.specs.shards.writer import TOKENIZING, Part, Tokenizing, unreadable_again, write_stream

_NICENESS = 10
"""The training beside it comes first."""

_POLL_SECONDS = 0.5
"""The time between two looks at streams that other processes write."""


def tokenize(rounds: Sequence[Sequence[Part]], how: Tokenizing, progress: Progress) -> None:
    """Writes the streams of each round in turn, those of a round side by side in proportion to their shares, each up to
    what is wanted of it. WorkError as for `write_stream`.
    """
    with Pool(how.encoder, max(1, cores())) as pool:
        for parts in rounds:
            streams = [_Stream(part, how, progress, pool) for part in parts]
            try:
                _side_by_side(streams)
            finally:
                for one in streams:
                    one.close()


def _side_by_side(streams: Sequence[_Stream]) -> None:
    while left := [one for one in streams if not one.done()]:
        behind = sorted(left, key=lambda one: one.tokens / one.part.share)
        if not any(one.advance() for one in behind):
            time.sleep(_POLL_SECONDS)


class _Stream:
    """The stream of a part, written by this process or, as long as that one holds the lock, by another."""

    def __init__(self, part: Part, how: Tokenizing, progress: Progress, pool: Pool) -> None:
        self.part, self.how, self.progress, self.pool = part, how, progress, pool
        self.there = GrowingStream(part.folder)
        self._lock = ExitStack()
        self._turns: Iterator[int] | None = None

    @property
    def tokens(self) -> int:
        return len(self.there)

    def done(self) -> bool:
        """Checks whether the stream has what is wanted of it; then the folder is free for others."""
        self.there.poll()
        if not self.there.reaches(self.part.until):
            return False
        if self._turns is not None and not self.there.ended:
            documents, tokens = plural(self.there.documents, "document"), plural(self.tokens, "token")
            self.progress.message(f"tokenized the first {documents}: {tokens}, which the training does not read beyond")
        self.close()
        return True

    def advance(self) -> bool:
        """Writes the next shard. Returns False where another process is writing the stream."""
        if self._turns is None:
            try:
                self._lock.enter_context(only_one(self.part.folder, TOKENIZING))
            except UsageError:
                return False
            if self.done():  # by another process, which has just ended
                return True
            self._turns = write_stream(self.part, self.how, self.progress, self.pool)
        if next(self._turns, None) is None and not self.done():
            raise unreadable_again(self.part.folder)
        return True

    def close(self) -> None:
        """Stops writing and releases the lock."""
        if self._turns is not None:
            self._turns.close()  # type: ignore[attr-defined]  # a generator
            self._turns = None
        self._lock.close()


# --- the request ---

_PLAIN = ("limit", "until", "share", "marks")
"""The fields of a part that are JSON as they are."""


def request(rounds: Sequence[Sequence[Part]], how: Tokenizing) -> bytes:
    """Builds the line that asks for streams. The tokenizer must be one of the library."""
    assert how.encoder.recipe.tokenizer is not None
    document = {
        "recipe": how.encoder.recipe.to_json(),
        "vocabulary": how.vocabulary,
        "shard_tokens": how.shard_tokens,
        "rounds": [[_plain(part) for part in parts] for parts in rounds],
    }
    return json.dumps(document).encode() + b"\n"


def _plain(part: Part) -> dict[str, Any]:
    own = {key: getattr(part, key) for key in _PLAIN} | {"folder": str(part.folder)}
    return own | {"source": part.source.model_dump(mode="json"), "blended": isinstance(part.source, BlendPart)}


def _part(values: dict[str, Any]) -> Part:
    kind: type[Source] = BlendPart if values["blended"] else DataSource
    own = {key: values[key] for key in _PLAIN}
    return Part(kind.model_validate(values["source"]), Path(values["folder"]), **own)


class _Told(Silent):
    """Sends messages to the process that asked."""

    def message(self, text: str) -> None:
        _say({"message": text})


def _say(document: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _end_with_stdin() -> None:
    while os.read(0, 1 << 12):
        pass
    os._exit(1)


def main() -> None:
    wanted = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with suppress(OSError):
        os.nice(_NICENESS)
    how = Tokenizing(Encoder(EncodingRecipe(**wanted["recipe"])), wanted["vocabulary"], wanted["shard_tokens"])
    code = 0
    try:
        tokenize([[_part(values) for values in parts] for parts in wanted["rounds"]], how, _Told())
    except MinitronError as error:
        code = _fail(str(error))
    except Exception as error:  # said by the process that asked, whose user sees no traceback
        code = _fail(f"tokenizing failed: {type(error).__name__}: {first_line(error)}")
    os._exit(code)  # a thread waits for stdin


def _fail(text: str) -> int:
    with suppress(BrokenPipeError):
        _say({"error": text})
    return 1


if __name__ == "__main__":
    main()
