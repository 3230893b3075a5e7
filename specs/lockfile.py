"""Reads and writes `NAME.lock.yaml`, the pinned inputs of a compile, and lists what has changed since.

A lock holds the inputs that the spec only names: the commit that a revision pointed to, hashes of configuration,
weights, tokenizer and data, the versions of the tools. Values of the spec itself (widths, tokens, learning rates) are
not in it, so a width can be changed without renewing the lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, Union

import yaml

from minitron.specs import source
from minitron.specs.data import DataSource, Source
from minitron.specs.data_files import data_sources
from minitron.specs.errors import SpecError, SpecInvalid, UsageError
from minitron.specs.load import LoadedSpec
from minitron.specs.small_files import read_small

FORMAT_VERSION = 1
LOCK_SUFFIX = ".lock.yaml"
_SHOWN = 12  # digits of a hash in a message

Inputs: TypeAlias = dict[str, Union["Inputs", str]]
"""Nested names and texts: hashes as `sha256:...`, commits, versions."""

HEADER = """\
# What {spec} is compiled from, pinned: commit this file beside it.
# Written by `minitron lock {spec}`, which also renews it; `--locked` refuses whatever is not as it says.
"""
# One comment a block, for those who see the file in a review.
COMMENTS = {
    "teacher": "Hashes are of config.json and of the tensors' names, dtypes and shapes; no weight is read. Of a "
    "model on the\n# Hub the commit is what plan, compile and run take, wherever its revision points by now.",
    "tokenizer": "Every file that makes up the tokenizer.",
    "data": "Contents by file, or the commit of a data set on the Hub; of many files, one hash of all.",
    "versions": "Another version may select and round differently.",
}


@dataclass(frozen=True)
class Lock:
    """A lock file that was read, with its places."""

    path: Path
    tree: source.Mapping
    inputs: Inputs

    def error(self, path: tuple[str, ...], message: str, hint: str) -> SpecError:
        """Returns an error at the place of a key, or of its nearest parent."""
        place, node = self.tree.place, self.tree
        for key in path:
            if key not in node.entries:
                break
            entry = node.entries[key]
            place = entry.place
            if not isinstance(entry.node, source.Mapping):
                break
            node = entry.node
        return place.error(" ".join(path), message, hint)


def lock_path(loaded: LoadedSpec) -> Path:
    """Returns the path of the lock: beside the spec, under the spec's name."""
    return loaded.folder / f"{loaded.spec.name}{LOCK_SUFFIX}"


def read_lock(loaded: LoadedSpec) -> Lock | None:
    """Returns the lock of a spec, None if there is none. SpecInvalid with the place if it is broken."""
    path = lock_path(loaded)
    try:
        content = read_small(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    renew = f"`minitron lock {loaded.path.name}` writes it again"
    root, errors = source.read_bytes(content, str(path))
    if errors or not isinstance(root, source.Mapping):
        raise SpecInvalid(errors or [root.place.error("", "is not a lock file", renew)])
    inputs = _texts(root)
    version = inputs.pop("format_version", None)
    lock = Lock(path, root, inputs)
    if version != str(FORMAT_VERSION):
        message = f"{version} is not the format that this version reads, {FORMAT_VERSION}"
        raise SpecInvalid([lock.error(("format_version",), message, renew)])
    inputs.pop("spec", None)
    return lock


def with_lock(loaded: LoadedSpec) -> LoadedSpec:
    """Returns the spec pinned to the commits of its lock file, if there is one."""
    lock = read_lock(loaded)
    return loaded if lock is None else loaded.pinned(pins(lock, loaded))


def pins(lock: Lock, loaded: LoadedSpec) -> dict[str, str]:
    """Returns dotted path -> commit for every model and data set that the spec still names as it did when it was
    locked."""
    found: dict[str, str] = {}
    spec = loaded.written or loaded.spec
    teacher = _part(lock.inputs, "teacher")
    if "commit" in teacher and (teacher.get("model"), teacher.get("revision")) == (
        spec.teacher.model,
        spec.teacher.revision,
    ):
        found["teacher.revision"] = str(teacher["commit"])
    for at, one in data_sources(spec):
        for path, key, part in source_parts(at, one):
            locked = _part(_part(lock.inputs, "data"), key)
            if "commit" in locked and (locked.get("dataset"), locked.get("revision")) == (part.dataset, part.revision):
                found[f"{path}.revision"] = str(locked["commit"])
    return found


def source_parts(at: str, one: DataSource) -> Iterator[tuple[str, str, Source]]:
    """Yields (dotted path, key in the lock, source) of a source, or of each part of a blend."""
    if one.blend is None:
        yield at, at, one
        return
    for index, part in enumerate(one.blend):
        path = f"{at}.blend.{index}"
        yield path, path, part


def render_lock(inputs: Inputs, spec: str) -> str:
    """Returns the file's text; `spec` is the spec's file name. The same inputs give the same bytes."""
    lines = [*HEADER.format(spec=spec).splitlines(), f"format_version: {FORMAT_VERSION}", f"spec: {_scalar(spec)}"]
    for key, value in inputs.items():
        lines += ["", *(f"# {COMMENTS[key]}".splitlines() if key in COMMENTS else [])]
        lines += _lines(key, value, 0)
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Inputs | str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, str):
        yield f"{indent}{_scalar(key)}: {_scalar(value)}"
    elif not value:
        yield f"{indent}{_scalar(key)}: {{}}"
    else:
        yield f"{indent}{_scalar(key)}:"
        for name, inner in value.items():
            yield from _lines(name, inner, depth + 1)


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, width=1 << 20).splitlines()[0]


def changes(before: Inputs, now: Inputs) -> Iterator[tuple[tuple[str, ...], str | None, str | None]]:
    """Yields (path, before, now) for every difference; None on the side that lacks the key."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for path in dict.fromkeys([*old, *new]):
        if old.get(path) != new.get(path):
            yield path, old.get(path), new.get(path)


def stale(lock: Lock, now: Inputs, spec: str) -> list[SpecError]:
    """Returns an error, at its line, for each entry of the lock that no longer matches the inputs."""
    hint = f"`minitron lock {spec}` renews it"
    return [lock.error(path, in_words(before, after), hint) for path, before, after in changes(lock.inputs, now)]


def in_words(before: str | None, now: str | None) -> str:
    """Describes one change, to follow the name of what changed."""
    if before is None:
        return f"is {_short(now)} and not locked"
    if now is None:
        return f"is locked at {_short(before)} and no longer used"
    return f"is locked at {_short(before)} and is {_short(now)} now"


def _short(text: str | None) -> str:
    """Shortens hashes and commits to their first digits."""
    return re.sub(rf"\b([0-9a-f]{{{_SHOWN}}})[0-9a-f]{{20,}}\b", r"\1", str(text))


def _leaves(inputs: Inputs, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in inputs.items():
        if isinstance(value, str):
            yield (*above, key), value
        else:
            yield from _leaves(value, (*above, key))


def _texts(node: source.Mapping) -> Inputs:
    """Returns the entries as written: a commit made of digits alone stays text."""
    inputs: Inputs = {}
    for key, entry in node.entries.items():
        match entry.node:
            case source.Mapping():
                inputs[key] = _texts(entry.node)
            case source.Scalar(text=text):
                inputs[key] = text
            case _:
                inputs[key] = ""
    return inputs


def _part(inputs: Mapping[str, Inputs | str], key: str) -> Inputs:
    value = inputs.get(key)
    return value if isinstance(value, dict) else {}
