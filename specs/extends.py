"""Resolves `extends`: merges a spec over the spec that it names as its base."""

from __future__ import annotations

import os
from pathlib import Path

from minitron.specs.errors import SpecError, SpecInvalid
from minitron.specs.references import EXTENDS, is_path
from minitron.specs.small_files import read_small
from minitron.specs.source import Entry, Mapping, Node, Scalar, Sequence, read_bytes


def read_with_bases(content: bytes, file: str) -> tuple[Mapping, list[SpecError]]:
    """Returns the tree of a file, merged over its bases, and the mistakes that still leave a tree.

    Places point into the file that a value stands in; `file` is the name of the first file in messages. SpecInvalid for
    mistakes that leave no tree.
    """
    tree, errors = _mapping(content, file)
    layers = [tree]
    seen = [os.path.realpath(file)]
    folder = Path(file).parent
    while (entry := layers[-1].entries.pop(EXTENDS, None)) is not None:
        base = _base_file(entry, folder, seen)
        tree, more = _mapping(_read(base, entry), str(base))
        errors += more
        folder = base.parent
        layers.append(_rebased(tree, Path(file).parent, folder))
    merged = layers.pop()
    while layers:
        merged = merge(merged, layers.pop())
    return merged, errors


def merge(base: Mapping, over: Mapping) -> Mapping:
    """Merges mappings key by key; everything else in `over` replaces the value in `base`."""
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        below = entries.get(key)
        if below is not None and isinstance(below.node, Mapping) and isinstance(entry.node, Mapping):
            entry = Entry(entry.place, merge(below.node, entry.node))
        entries[key] = entry
    return Mapping(over.place, entries)


def _mapping(content: bytes, file: str) -> tuple[Mapping, list[SpecError]]:
    root, errors = read_bytes(content, file)
    if isinstance(root, Mapping):
        return root, errors
    empty = isinstance(root, Scalar) and root.value is None
    message = "the file is empty" if empty else "a spec is a mapping (`key: value`), and this is not"
    raise SpecInvalid([*errors, root.place.error("", message, "`minitron init` writes one to start from")])


def _base_file(entry: Entry, folder: Path, seen: list[str]) -> Path:
    node = entry.node
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        raise SpecInvalid(
            [entry.place.error(EXTENDS, "the base is not a path", "write one file, such as `extends: base.yaml`")]
        )
    base = Path(os.path.normpath(folder / node.value))
    if os.path.realpath(base) in seen:
        message = f"`{node.value}` comes back to a file that already extends it"
        raise SpecInvalid(
            [node.place.error(EXTENDS, message, "a base must not extend, directly or not, what extends it")]
        )
    seen.append(os.path.realpath(base))
    return base


def _read(base: Path, entry: Entry) -> bytes:
    try:
        return read_small(base)
    except OSError as error:
        assert isinstance(entry.node, Scalar)
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        raise SpecInvalid(
            [entry.node.place.error(EXTENDS, f"`{entry.node.text}`: {reason}", "write a path relative to this file")]
        ) from None


def _rebased(base: Mapping, to: Path, folder: Path) -> Mapping:
    """Returns the base with its relative paths rewritten relative to the folder `to`."""
    if os.path.realpath(to) == os.path.realpath(folder):
        return base
    way = Path(os.path.relpath(folder, to))

    def rewrite(node: Node, key: str) -> Node:
        match node:
            case Mapping():
                entries = {name: Entry(entry.place, rewrite(entry.node, name)) for name, entry in node.entries.items()}
                return Mapping(node.place, entries)
            case Sequence():
                return Sequence(node.place, [rewrite(item, key) for item in node.items])
            case Scalar(value=str(text)) if not Path(text).is_absolute() and is_path(text, key, folder):
                return Scalar(node.place, node.text, os.path.normpath(way / text))
            case _:
                return node

    rewritten = rewrite(base, "")
    assert isinstance(rewritten, Mapping)
    return rewritten
