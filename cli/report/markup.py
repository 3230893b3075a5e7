"""HTML from Python, escaped by construction: every string that is not `Markup` is escaped when it is inserted."""

from __future__ import annotations

import html
from collections.abc import Iterable

from minitron.cli.text import printable

# Elements that have no end tag. SVG's own are written with one, which HTML accepts and which keeps a page balanced.
_VOID = frozenset({"meta", "br"})

Attribute = str | int | float | None


class Markup(str):
    """A string of HTML, made only by `element`, `text` and `join`."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: Attribute) -> Markup:
    """Makes `<name attributes>children</name>`.

    Children that are not `Markup` are escaped, None is left out. An attribute's underscores stand for hyphens, one at
    the end is dropped (`class_`), None leaves the attribute out; floats are written with one decimal, as coordinates.
    """
    start = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        assert not children, f"<{name}> holds nothing"
        return Markup(f"<{name}{start}>")
    return Markup(f"<{name}{start}>{join(children)}</{name}>")


def text(value: str) -> Markup:
    """Escapes `value` for use between tags or in quotes; control characters and lone surrogates are replaced."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(value), quote=True))


def join(parts: Iterable[str | None]) -> Markup:
    """Concatenates the parts."""
    return Markup("".join(text(part) for part in parts if part is not None))


def _value(value: str | int | float) -> str:
    return text(value) if isinstance(value, str) else f"{value:.1f}" if isinstance(value, float) else str(value)
