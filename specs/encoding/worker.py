"""The process that encodes: `python -m minitron.specs.encoding.worker` reads requests from stdin and answers on stdout.

A message is a line of JSON; behind an answer follow the bytes of the token ids (uint32) and of the marks of what is learnt
(uint8). No object of Python's own travels, so nothing in a message is ever executed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from minitron.specs.documents.kinds import Conversation, Piece, TokenIds
from minitron.specs.encoding.chat import RENDER_BYTES
from minitron.specs.encoding.encoder import Encoded, Encoder
from minitron.specs.encoding.recipe import EncodingRecipe
from minitron.specs.errors import WorkError


def request(pieces: Sequence[Piece]) -> bytes:
    """Builds the line that asks for the tokens of pieces."""
    return json.dumps([_plain(piece) for piece in pieces]).encode() + b"\n"


def answer(encoded: Sequence[Encoded]) -> bytes:
    heads = [
        {"n": len(one.ids), "marked": one.learnt is not None, "where": one.where, "ends": one.ends, "error": one.error}
        for one in encoded
    ]
    parts = [json.dumps(heads).encode() + b"\n"]
    for one in encoded:
        parts.append(one.ids.tobytes())
        if one.learnt is not None:
            parts.append(one.learnt.astype(np.uint8).tobytes())
    return b"".join(parts)


def read_answer(stream: IO[bytes]) -> list[Encoded]:
    """Reads one answer. WorkError as the other process raised it; EOFError if that process ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    heads = json.loads(line)
    if isinstance(heads, dict):
        raise WorkError(heads["error"])
    encoded = []
    for head in heads:
        ids = np.frombuffer(_exactly(stream, 4 * head["n"]), np.uint32)
        learnt = np.frombuffer(_exactly(stream, head["n"]), np.uint8).astype(bool) if head["marked"] else None
        encoded.append(Encoded(ids, learnt, head["where"], head["ends"], head["error"]))
    return encoded


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def _plain(piece: Piece) -> list[Any]:
    content: Any = piece.content
    if isinstance(content, Conversation):
        content = [content.messages, content.tools, content.train_on, content.pair]
    elif isinstance(content, TokenIds):
        content = [int(one) for one in content.ids]
    return [type(piece.content).__name__, content, piece.where, piece.begins, piece.ends, piece.lenient]


def _piece(values: list[Any]) -> Piece:
    kind, content, where, begins, ends, lenient = values
    if kind == Conversation.__name__:
        content = Conversation(*content)
    elif kind == TokenIds.__name__:
        content = TokenIds(content)
    return Piece(content, where, begins=begins, ends=ends, lenient=lenient)


def main() -> None:
    source, target = sys.stdin.buffer, sys.stdout.buffer
    encoder = Encoder(EncodingRecipe(**json.loads(source.readline())))
    limited = False
    for line in source:
        pieces = [_piece(values) for values in json.loads(line)]
        if not limited and any(isinstance(piece.content, Conversation) for piece in pieces):
            _limit_memory()
            limited = True
        try:
            reply = answer(encoder.encode(pieces))
        except WorkError as error:
            reply = json.dumps({"error": str(error)}).encode() + b"\n"
        target.write(reply)
        target.flush()


def _limit_memory() -> None:
    """Limits memory before templates run: beyond RENDER_BYTES a template raises MemoryError."""
    import resource
    from pathlib import Path

    import transformers.utils.chat_template_utils  # noqa: F401

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return  # no Linux: time is limited all the same
    limit = pages * resource.getpagesize() + RENDER_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
