"""Finds what the rows of a data set have their documents in, where `init` is only given files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve
from minitron.specs.documents import Tally
from minitron.specs.documents.readers import read_source
from minitron.specs.documents.rows import CHATS
from minitron.specs.errors import MinitronError


def fields_of(source: Mapping[str, Sequence[str] | str], folder: Path) -> dict[str, str]:
    """Returns the options that the first document can be read with; none where the field is `text`, where the data are no
    rows, or where no usual name fits, which the plan reports.
    """
    if "text" in source:
        return {}
    return next((options for options in _usual() if _reads({**source, **options}, folder)), {})


def _usual() -> Iterator[dict[str, str]]:
    yield {}
    yield from ({"messages_field": name} for name in CHATS)
    yield {"prompt_field": "prompt"}
    yield {"ids_field": "input_ids"}


def _reads(source: Mapping[str, Sequence[str] | str], folder: Path) -> bool:
    try:
        return next(read_source(resolve(DataSource.model_validate(source), folder), Tally()), None) is not None
    except MinitronError:
        return False
