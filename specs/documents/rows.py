"""Extracts the document from a row of a data file, a mapping of fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from minitron.specs.data import Source
from minitron.specs.documents.kinds import Conversation, Document, Message, Tally, TokenIds
from minitron.specs.errors import WorkError
from minitron.specs.suggest import did_you_mean

_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSING = object()
LARGEST_ID = 2**31 - 1
CHATS = ("messages", "conversation", "conversations", "chat")  # fields that data sets of chats have
_SHOWN_FIELDS = 20  # of a row, in a message


class RowReader:
    """Reads the rows of one source by its row options."""

    def __init__(self, source: Source, tally: Tally) -> None:
        self.source, self.tally = source, tally
        self.option, self.name = content_field(source)

    @property
    def columns(self) -> list[str]:
        """Returns the names of all fields that a row needs, as the source writes them."""
        more = [self.source.completion_field, self.source.tools_field]
        return [self.name, *(name for name in more if name is not None)]

    def read(self, row: Any, where: str) -> Document | None:
        """Returns the document in a row; None for an empty one. WorkError, which lists what the row has instead, if
        there is none."""
        if not isinstance(row, dict):
            raise WorkError(f"{where}: is not an object with a field `{self.name}`; each document must be one")
        value = self._required(row, self.name, self.option, where)
        if value is None:
            return None
        match self.option:
            case "text_field":
                return self._text(value, self.name, self.option, where)
            case "ids_field":
                return self._ids(value, where)
            case "prompt_field":
                return self._pair(value, row, where)
            case _:
                return self._conversation(value, row, where)

    def _required(self, row: dict[str, Any], name: str, option: str, where: str) -> Any:
        value = look_up(row, name)
        if value is _MISSING:
            raise no_field(where, name, option, row)
        return value

    def _text(self, value: Any, name: str, option: str, where: str) -> str:
        if isinstance(value, str):
            return str(self._whole(value))
        raise WorkError(f"{where}: `{name}` is not text; name the field that holds the text as `{option}`")

    def _ids(self, value: Any, where: str) -> TokenIds | None:
        whole = isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
        if not whole:
            raise WorkError(f"{where}: `{self.name}` is not a list of token ids; name the field that is as `ids_field`")
        if value and max(value) > LARGEST_ID:
            raise WorkError(
                f"{where}: `{self.name}` holds {max(value)}, which is no token of any vocabulary; write it again"
            )
        return TokenIds(value) if value else None

    def _pair(self, prompt: Any, row: dict[str, Any], where: str) -> Conversation | None:
        name = str(self.source.completion_field)
        completion = self._required(row, name, "completion_field", where)
        if completion is None:
            return None
        messages = [
            {"role": "user", "content": self._text(prompt, self.name, self.option, where)},
            {"role": "assistant", "content": self._text(completion, name, "completion_field", where)},
        ]
        return Conversation(self._with_system(messages), None, self.source.train_on or "all", pair=True)

    def _conversation(self, value: Any, row: dict[str, Any], where: str) -> Conversation | None:
        if value == []:
            return None
        if not isinstance(value, list) or not all(_is_message(item) for item in value):
            wanted = 'a list of messages such as {"role": "user", "content": "..."}'
            raise WorkError(f"{where}: `{self.name}` is not {wanted}; name the field that is as `messages_field`")
        messages = self._whole([_given(message) for message in value])
        return Conversation(self._with_system(messages), self._tools(row, where), self.source.train_on or "all")

    def _tools(self, row: dict[str, Any], where: str) -> list[Any] | None:
        name = self.source.tools_field
        value = look_up(row, name) if name is not None else None
        if value is None or value is _MISSING or value == []:
            return None
        if isinstance(value, str):  # parquet columns hold them so, because no two tools have the same fields
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise WorkError(f"{where}: `{name}` is not a list of tools; name the field that is as `tools_field`")
        return list(self._whole([_pruned(tool) for tool in value]))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.source.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.source.system}, *messages]

    def _whole(self, value: Any) -> Any:
        """Replaces each unpaired surrogate by U+FFFD, because UTF-8 cannot express it."""
        repaired = _without_surrogates(value)
        if repaired is not value:
            self.tally.repaired += 1
        return repaired


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def content_field(source: Source) -> tuple[str, str]:
    """Returns (option, name) of the field that a document is read from."""
    for option in ("messages_field", "prompt_field", "ids_field"):
        if (name := getattr(source, option)) is not None:
            return option, str(name)
    return "text_field", str(source.text_field)


def look_up(row: dict[str, Any], name: str) -> Any:
    """Returns the value of a field, or of a nested field (`content.body`); a private sentinel if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def no_field(where: str, name: str, option: str, known: Iterable[str]) -> WorkError:
    fields = [str(key) for key in known]
    if option == "text_field" and (chat := next((one for one in fields if one in CHATS), None)) is not None:
        return WorkError(f"{where}: has no field `{name}`, and has `{chat}`: write `messages_field: {chat}` for chats")
    meant = did_you_mean(name, fields)
    shown = [f"`{key}`" for key in fields[:_SHOWN_FIELDS]] + (["..."] if len(fields) > _SHOWN_FIELDS else [])
    there = ", ".join(shown) or "nothing"
    return WorkError(f"{where}: has no field `{name}`; {meant}there is {there}: write one of them as `{option}`")


def _given(message: Message) -> Message:
    """Returns a message without the keys that only other messages have.

    Columns of parquet files and data sets give every message all keys, with null for those that the message lacks, and
    templates test whether a key exists. A null `content` stays, because a message with tool calls has no content.
    """
    return {key: _pruned(value) for key, value in message.items() if value is not None or key == "content"}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _without_surrogates(value: Any) -> Any:
    """Replaces unpaired surrogates in a nested value; returns the same object if nothing had to be replaced."""
    if isinstance(value, str):
        if value.isascii():
            return value
        replaced = _SURROGATE.sub("\ufffd", value)
        return value if replaced == value else replaced
    if isinstance(value, list):
        items = [_without_surrogates(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if isinstance(value, dict):
        pairs = {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
        same = all(new is old for new, old in zip(pairs.values(), value.values(), strict=False))
        return value if same and pairs.keys() == value.keys() else pairs
    return value
