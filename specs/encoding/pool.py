"""Encodes batches of documents in several processes, and yields their tokens in the order of the documents.

Processes are used instead of threads because only the tokenizer library releases the interpreter's lock; the Python
code that handles its tokens does not. Chat templates run only in these processes (`specs.encoding.chat`).
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TypeAlias

import minitron
from minitron.specs.documents.kinds import Conversation, Piece, size_of
from minitron.specs.encoding.encoder import Encoded, Encoder
from minitron.specs.encoding.recipe import EncodingRecipe
from minitron.specs.encoding.worker import read_answer, request
from minitron.specs.errors import WorkError

_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 4096

SMALL = 16 * _BATCH_CHARACTERS
"""Characters up to which text is encoded in this process: others take longer to start."""


_INTERPRETER_BYTES = 56 << 20
_TOKENIZER_BYTES, _BATCH_BYTES = 43, 90 << 20
"""The memory of a process that encodes, as measured: of the interpreter with its libraries; and the larger of what loading
a tokenizer takes, for each byte of its JSON (vocabularies of 128K), and what a batch takes (bytes as tokens)."""


def process_memory(recipe: EncodingRecipe) -> int | None:
    """Estimates the bytes of memory of each process that encodes; None for a tokenizer that is written in Python, which runs
    in the process that asks."""
    if recipe.tokenizer is None:
        return None
    return _INTERPRETER_BYTES + max(_TOKENIZER_BYTES * len(recipe.tokenizer), _BATCH_BYTES)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    encoder: Encoder,
    pieces: Iterable[Piece],
    *,
    skip: int = 0,
    processes: int | None = None,
    small: int = SMALL,
    pool: Pool | None = None,
) -> Iterator[list[Encoded]]:
    """Yields the tokens of all pieces, a batch at a time, in order. WorkError as for `Encoder.encode` and for reading the
    pieces, after all that lies before the piece that it is of: how far others have read ahead decides nothing.

    The first `skip` pieces, counted after `Encoder.prepare`, are skipped because an earlier process encoded them. The
    first `small` characters of text are encoded in this process. `processes` defaults to the number of cores; with 0
    all text is encoded in this process. `pool` is one that several calls share; left out, each has its own.
    """
    batches = _batches(itertools.islice(encoder.prepare(pieces), skip, None))
    processes = cores() if processes is None else processes
    library = encoder.recipe.tokenizer is not None
    done = 0
    for batch in batches:
        chat = any(isinstance(piece.content, Conversation) for piece in batch)
        if (chat and library) or (done >= small and library and processes > 0):
            with Pool(encoder, max(1, processes)) if pool is None else nullcontext(pool) as used:
                yield from used.encode(batch, batches)
            return
        encoded, error = _up_to_error(encoder.encode, batch)
        yield encoded
        if error is not None:
            raise error
        done += sum(size_of(piece.content) for piece in batch)


Encode: TypeAlias = Callable[[list[Piece]], list[Encoded]]


def _up_to_error(encode: Encode, batch: list[Piece]) -> tuple[list[Encoded], WorkError | None]:
    """Encodes a batch, up to the first piece that cannot be encoded."""
    try:
        return encode(batch), None
    except _ProcessEnded as error:
        return [], error
    except WorkError:
        done: list[Encoded] = []
        for piece in batch:
            try:
                done += encode([piece])
            except WorkError as error:
                return done, error
        return done, None


class _ProcessEnded(WorkError):
    """The end of a process that encodes; the documents of its batch are not tried again."""


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Groups pieces into batches: large enough to be worth a message, never larger than fits in memory. An error in
    reading a piece comes after the batch of those before it.
    """
    batch: list[Piece] = []
    size = 0
    pieces = iter(pieces)
    while True:
        try:
            piece = next(pieces, None)
        except WorkError:
            if batch:
                yield batch
            raise
        if piece is None:
            break
        batch.append(piece)
        size += size_of(piece.content)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Pool:
    """Processes that encode; each is started when there is work for it."""

    def __init__(self, encoder: Encoder, processes: int) -> None:
        self.encoder, self.processes = encoder, processes
        self.idle: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        self.started: list[subprocess.Popen[bytes]] = []
        self.threads = ThreadPoolExecutor(processes)
        self.lock, self.closed = Lock(), False
        for _ in range(processes):
            self.idle.put(None)

    def encode(self, first: list[Piece], rest: Iterator[list[Piece]]) -> Iterator[list[Encoded]]:
        """Yields the tokens of `first` and of `rest`, in order; errors as for `encode_all`."""
        waiting = collections.deque([self.threads.submit(_up_to_error, self._ask, first)])
        unread: WorkError | None = None
        while True:
            try:
                batch = next(rest, None)
            except WorkError as error:
                unread = error
                break
            if batch is None:
                break
            waiting.append(self.threads.submit(_up_to_error, self._ask, batch))
            while len(waiting) > 2 * self.processes or (waiting and waiting[0].done()):
                yield from _result(waiting.popleft())
        while waiting:
            yield from _result(waiting.popleft())
        if unread is not None:
            raise unread

    def _ask(self, batch: list[Piece]) -> list[Encoded]:
        process = self.idle.get() or self._start()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(request(batch))
            process.stdin.flush()
            return read_answer(process.stdout)
        except (EOFError, OSError):
            code = process.wait()
            raise _ProcessEnded(
                f"{batch[0].where}: the process that encodes this document and the {len(batch) - 1} behind it ended with "
                f"code {code}; where it is the chat template that takes endless time or memory, mend it, else make more "
                "memory free"
            ) from None
        finally:
            self.idle.put(process if process.poll() is None else None)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "minitron.specs.encoding.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        with self.lock:
            self.started.append(process)
            if self.closed:
                process.kill()
        assert process.stdin is not None
        process.stdin.write(json.dumps(self.encoder.recipe.to_json()).encode() + b"\n")
        return process

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.closed = True
            for process in self.started:
                process.kill()
        self.threads.shutdown()  # what was asked of them ends with them
        for process in self.started:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _result(future: Future[tuple[list[Encoded], WorkError | None]]) -> Iterator[list[Encoded]]:
    encoded, error = future.result()
    yield encoded
    if error is not None:
        raise error


def _environment() -> dict[str, str]:
    """Returns the environment of the encoding processes: that of this process, one thread each, the same `minitron`."""
    here = str(Path(minitron.__file__).resolve().parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    one = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    return os.environ | one | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
