"""Reads the elements of a JSON array that may be larger than memory, one at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from minitron.specs.documents.opening import BLOCK, not_utf8
from minitron.specs.errors import WorkError

_SPACE = " \t\r\n"


def elements(handle: IO[bytes], where: str) -> Iterator[tuple[Any, str]]:
    """Yields (element, place) of the array that a file holds. WorkError if the file holds no array or an incomplete
    one."""
    decoder, text = json.JSONDecoder(), _Buffer(handle, where)
    text.expect("[")
    number = 0
    if text.next() == "]":
        return
    while True:
        number += 1
        place = f"{where} element {number}"
        yield text.element(decoder, place), place
        if text.next() == "]":
            text.expect("]")
            if text.next():
                raise WorkError(f"{where}: goes on behind the end of its JSON array; write one array, or JSON Lines")
            return
        text.expect(",")


class _Buffer:
    """The text that was read and is not parsed yet."""

    def __init__(self, handle: IO[bytes], where: str) -> None:
        self.handle, self.where, self.text = handle, where, ""
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Reads on, as much as the buffer already holds, so that a long element is seldom parsed from its beginning
        again."""
        block = self.handle.read(max(BLOCK, len(self.text)))
        try:
            self.text += self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(self.where, error) from None
        return bool(block)

    def next(self) -> str:
        """Returns the next character that is not white space without consuming it; empty at the end of the file."""
        while True:
            self.text = self.text.lstrip(_SPACE)
            if self.text or not self.more():
                return self.text[:1]

    def expect(self, character: str) -> None:
        if self.next() != character:
            raise WorkError(f"{self.where}: is not a whole JSON array; write it again, or write JSON Lines")
        self.text = self.text[1:]

    def element(self, decoder: json.JSONDecoder, place: str) -> Any:
        self.next()
        while True:
            try:
                value, end = decoder.raw_decode(self.text)
                if end < len(self.text) or not self.more():  # a number may go on in the next block
                    self.text = self.text[end:]
                    return value
            except RecursionError:
                raise WorkError(f"{place}: is nested too deeply to be a document; leave it out") from None
            except ValueError:
                if not self.more():
                    raise WorkError(f"{place}: is not JSON; write the array again, or write JSON Lines") from None
