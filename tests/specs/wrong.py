"""A wrong spec, and what is asked of the message that its user is shown."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.specs.conftest import Errors
from tests.specs.specimens import SMALL

DISTILL = SMALL.replace(
    "distill: {data: {text: [a.txt]}, tokens: 1B}", "distill:\n  data: {text: [a.txt]}\n  tokens: 1B"
)


class Wrong(NamedTuple):
    """A spec and its one error; `place` is line:column."""

    text: str
    place: str
    path: str
    message: str
    hint: str

    def is_told(self, errors_of: Errors) -> None:
        """Checks that the mistake is one error at its place, in the language of the spec."""
        errors = errors_of(self.text)
        assert [error.path for error in errors] == [self.path]
        (error,) = errors
        assert f"{error.line}:{error.column}" == self.place, str(error)
        assert self.message in error.message
        assert any(hint in error.hint for hint in self.hint.split("|")), error.hint
        shown = str(error)
        assert not re.search(r"pydantic|Input should|validation error|https?://|<word>|<longer>|class|None", shown)
        assert re.match(r".*spec\.yaml:\d+:\d+: [\w.]+: \S.*; \S", shown)
