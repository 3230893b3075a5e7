"""Reads from the models which keys and values the language allows at a path, so that messages agree with the models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from minitron.specs.blocks.base import Block

Path: TypeAlias = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """Joins a path: `("data", "text", 0)` -> `data.text.0`."""
    return ".".join(str(part) for part in path)


def from_dotted(path: str) -> Path:
    """Splits a path: `data.text.0` -> `("data", "text", 0)`; whole numbers are list indices, because no key of the
    language is a number."""
    return tuple(int(part) if part.isdecimal() else part for part in path.split(".")) if path else ()


def alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the types that an annotation allows, with `Annotated` and unions taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from alternatives(one)
    else:
        yield annotation


def blocks_at(root: type[Block], path: Path) -> list[type[Block]]:
    """Returns the models that may stand at `path`; none if the path leads nowhere or to plain values."""
    return [kind for kind in _types_at(root, path) if isinstance(kind, type) and issubclass(kind, Block)]


def words_at(root: type[Block], path: Path) -> list[str]:
    """Returns the words that may stand at `path`, if only certain words may."""
    literals = (kind for kind in _types_at(root, path) if get_origin(kind) is Literal)
    return [word for literal in literals for word in get_args(literal)]


def _types_at(root: type[Block], path: Path) -> list[Any]:
    found: list[Any] = [root]
    for part in path:
        found = [inner for kind in found for inner in _step(kind, part)]
    return found


def _step(kind: Any, part: str | int) -> Iterator[Any]:
    if isinstance(part, str):
        if isinstance(kind, type) and issubclass(kind, Block) and part in kind.model_fields:
            yield from alternatives(kind.model_fields[part].annotation)
    elif get_origin(kind) is tuple:
        yield from alternatives(get_args(kind)[0])


def all_blocks(root: type[Block], path: str = "") -> Iterator[tuple[str, type[Block]]]:
    """Yields every block of the language with its dotted path; blocks in a list have the path of the list."""
    yield path, root
    for key, field in root.model_fields.items():
        for kind in alternatives(field.annotation):
            items = alternatives(get_args(kind)[0]) if get_origin(kind) is tuple else [kind]
            for item in items:
                if isinstance(item, type) and issubclass(item, Block):
                    yield from all_blocks(item, f"{path}.{key}".lstrip("."))


@cache
def homes(root: type[Block]) -> dict[str, list[str]]:
    """Returns every key of the language with the paths of the blocks that allow it, for keys in the wrong block."""
    found: dict[str, list[str]] = {}
    for path, block in all_blocks(root):
        for key in block.model_fields:
            found.setdefault(key, []).append(path)
    return found
