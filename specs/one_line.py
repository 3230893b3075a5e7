"""Makes text from outside safe for messages: on one line, without control characters, and not too long."""

from __future__ import annotations

import json
import re
import unicodedata

# A quoted value, or a run of characters without a space, is cut beyond this; most paths are shorter.
LONGEST = 300
_SHOWN = 80  # characters of a cut value that stay

_QUOTED = re.compile(rf"`([^`]{{{LONGEST},}})`")
_RUN = re.compile(rf"\S{{{LONGEST},}}")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Control and format characters, lone surrogates, unassigned and private ones, line and paragraph separators: what a
# terminal obeys, what turns the order of letters round, and what cannot be written as UTF-8.
_HIDDEN = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
_NO_BREAK = "\xa0\u2007\u202f"  # look like a space, and are none to YAML


def one_line(text: str) -> str:
    """Escapes every character that moves a cursor, begins a line or is invisible: a newline becomes `\n`."""
    return text if text.isprintable() else "".join(_visible(one) for one in text)


def message_text(text: str) -> str:
    """Escapes `text` as `one_line` does and cuts quoted values and unbroken runs of more than `LONGEST` characters."""
    text = _QUOTED.sub(lambda found: f"`{_cut(found[1])}`", one_line(text))
    return _RUN.sub(lambda found: _cut(found[0]), text)


def _cut(value: str) -> str:
    return f"{value[:_SHOWN]} ... ({len(value):,} characters)"


def _visible(one: str) -> str:
    if one not in _NO_BREAK and unicodedata.category(one) not in _HIDDEN:
        return one
    code = ord(one)
    return _NAMED.get(one) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def plain(value: object) -> str:
    """Returns a value as a YAML file has it: `true` and not `True`."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def plural(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 document`, `12 documents`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
