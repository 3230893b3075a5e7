"""Finds the files of a data source and hashes everything that decides the documents."""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from minitron.specs.data import STDLIB_PREFIX, DataSource, Source, divided
from minitron.specs.errors import Problem, Refused, WorkError, first_line, placing
from minitron.specs.file_hashes import file_hash
from minitron.specs.load import LoadedSpec
from minitron.specs.spec import Spec

S = TypeVar("S", bound=Source)


def resolve(source: S, folder: Path, *, at: str = "data") -> S:
    """Returns the source with every pattern replaced by the files it matches: absolute, sorted, each once.

    Relative patterns start at `folder`. The standard library stays a word, because its folder differs between machines.
    Raises Refused with a problem for every pattern that matches nothing; `at` is the dotted path of the source.
    """
    problems: list[Problem] = []
    resolved = _resolved(source, folder, at, problems)
    if problems:
        raise Refused(problems)
    return resolved


def resolve_data(loaded: LoadedSpec) -> dict[str, DataSource]:
    """Returns dotted path -> resolved source for all data that a spec names, as it is read (`sources_as_read`).
    SpecInvalid with the place of every pattern that matches nothing."""
    problems: list[Problem] = []
    found = {at: _resolved(source, loaded.folder, at, problems) for at, source in sources_as_read(loaded.spec)}
    with placing(loaded):
        if problems:
            raise Refused(problems)
    return found


def check_data(loaded: LoadedSpec) -> list[Problem]:
    """Returns every problem of the data that a spec names."""
    problems: list[Problem] = []
    for at, source in data_sources(loaded.spec):
        _resolved(source, loaded.folder, at, problems)
    evaluate = loaded.spec.evaluate
    if evaluate is not None and evaluate.data_dir is not None and not (loaded.folder / evaluate.data_dir).is_dir():
        message = f"there is no folder `{evaluate.data_dir}`"
        problems.append(Problem("evaluate.data_dir", message, f"paths are relative to {loaded.folder.absolute()}"))
    return problems


def data_sources(spec: Spec) -> Iterator[tuple[str, DataSource]]:
    """Yields (dotted path, source) for all data that a spec names."""
    if spec.importance.data is not None:
        yield "importance.data", spec.importance.data
    if spec.distill is not None:
        yield "distill.data", spec.distill.data
        for index, phase in enumerate(spec.distill.phases):
            if phase.data is not None:
                yield f"distill.phases.{index}.data", phase.data
    held_out = spec.evaluate.held_out if spec.evaluate is not None else None
    if held_out is not None and held_out.fraction is None:
        yield "evaluate.held_out", held_out


def sources_as_read(spec: Spec) -> Iterator[tuple[str, DataSource]]:
    """Yields (dotted path, source) for all data as it is read: a held-out fraction becomes a share of the training
    data."""
    held_out = spec.evaluate.held_out if spec.evaluate is not None else None
    fraction = held_out.fraction if held_out is not None else None
    for at, source in data_sources(spec):
        cut = at.startswith("distill.") and fraction is not None
        yield at, divided(source, leave_out=fraction) if cut and fraction is not None else source
    if fraction is not None and spec.distill is not None:
        yield "evaluate.held_out", divided(spec.distill.data, only=fraction)


def _resolved(source: S, folder: Path, at: str, problems: list[Problem]) -> S:
    if isinstance(source, DataSource) and source.blend is not None:
        parts = enumerate(source.blend)
        blend = tuple(_resolved(part, folder, f"{at}.blend.{index}", problems) for index, part in parts)
        return source.model_copy(update={"blend": blend})
    if source.dataset is not None:
        return source.model_copy(update={"dataset": _dataset(source.dataset, folder, at, problems)})
    files: list[str] = []
    for index, pattern in enumerate(getattr(source, source.kind)):
        try:
            files += _expand(pattern, folder)
        except FileNotFoundError as missing:
            message, hint = missing.args
            problems.append(Problem(f"{at}.{source.kind}.{index}", message, hint))
    return source.model_copy(update={source.kind: tuple(dict.fromkeys(files))})


def _expand(pattern: str, folder: Path) -> list[str]:
    """Returns the absolute files of a pattern, sorted. FileNotFoundError(message, hint) if there are none."""
    if pattern.startswith(STDLIB_PREFIX):
        return [pattern]
    path = folder.absolute() / pattern
    try:
        mode = path.stat().st_mode  # before patterns: brackets may stand in a file's own name
    except (OSError, ValueError) as error:
        # Not a name that a file can have: too long, or with a NUL.
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise FileNotFoundError(f"{shown_path(pattern)} is not a valid file name", "write a path") from None
        return _matches(pattern, folder)
    if stat.S_ISREG(mode):
        return [str(path)]
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(
            f"`{pattern}` is a folder", f"name the files in it, such as {pattern.rstrip('/')}/**/*.txt"
        )
    raise FileNotFoundError(
        f"`{pattern}` is not a regular file", "write its contents to a file: data is read more than once"
    )


def _matches(pattern: str, folder: Path) -> list[str]:
    if glob.has_magic(pattern):
        _check_root(pattern, folder)
    # Not Path.glob, which refuses absolute patterns.
    found = (folder.absolute() / match for match in glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207
    files = sorted(str(file) for file in found if file.is_file())
    if files:
        return files
    if "${" in pattern or pattern.startswith("~"):
        raise FileNotFoundError(f"`{pattern}` names no file", "write the path out: variables and `~` are not expanded")
    if glob.has_magic(pattern):
        raise FileNotFoundError(f"`{pattern}` matches no file", f"patterns are relative to {folder.absolute()}")
    raise FileNotFoundError(f"there is no file `{pattern}`", f"paths are relative to {folder.absolute()}")


_WHOLE_MACHINE = ("/", "/proc", "/sys", "/dev")
"""Below these a search for files does not end, or finds entries that are not files."""


def _check_root(pattern: str, folder: Path) -> None:
    """Refuses a `**` that begins at the root of the file system instead of a folder of the user."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), parts)
    root = Path(os.path.normpath(folder.absolute().joinpath(*fixed)))
    if any(str(one) in _WHOLE_MACHINE[1:] for one in (root, *root.parents)) or str(root) == _WHOLE_MACHINE[0]:
        raise FileNotFoundError(f"`{pattern}` searches all of {root}", "name the folder that holds the data")


def shown_path(text: str) -> str:
    """Returns a path as messages show it: unprintable characters escaped, the middle of a long path left out."""
    plain = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return f"`{plain if len(plain) <= 120 else f'{plain[:80]}...{plain[-30:]}'}`"


def _dataset(name: str, folder: Path, at: str, problems: list[Problem]) -> str:
    path = folder.absolute() / name
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        problems.append(
            Problem(f"{at}.dataset", f"{shown_path(name)} is not the name of a data set", "write owner/name")
        )
        return name
    if is_folder and os.path.normpath(path) in _WHOLE_MACHINE:
        problems.append(Problem(f"{at}.dataset", f"`{name}` is not a data set", "name the folder that holds the data"))
    if is_folder:
        return str(path)
    if name.startswith((".", "/")):
        message = f"there is no folder `{name}`"
        problems.append(Problem(f"{at}.dataset", message, f"paths are relative to {folder.absolute()}"))
    return name


def data_files(source: Source) -> list[Path]:
    """Returns the files of a resolved source in the order of reading; none for a data set of the Hub."""
    if isinstance(source, DataSource) and source.blend is not None:
        return [file for part in source.blend for file in data_files(part)]
    if source.dataset is not None:
        folder = Path(source.dataset)
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_absolute() else []
    files: list[Path] = []
    for entry in getattr(source, source.kind):
        files += stdlib(entry) if entry.startswith(STDLIB_PREFIX) else [Path(entry)]
    if source.megatron is not None:
        files += [file.with_suffix(".idx") for file in files]
    return files


def stdlib(entry: str) -> list[Path]:
    from minitron.specs.stdlib_corpus import stdlib_files

    return stdlib_files("train" if entry == f"{STDLIB_PREFIX}train" else "held_out")


def content_hash(source: Source) -> str:
    """Hashes everything that decides the documents of a resolved source: options, file names and contents.

    Folders do not count, so the same data has the same hash on another machine. For a data set on the Hub only the id,
    split and revision count, because nothing else is known without reading the data.
    """
    # Files count by name and content, parts of a blend by their own hash. The amount that is read does not count.
    elsewhere = {"text", "jsonl", "parquet", "megatron", "blend", "samples", "sequence_length"}
    options = {key: value for key, value in source.model_dump(mode="json").items() if key not in elsewhere}
    if source.dataset is not None and data_files(source):
        options["dataset"] = "folder"
    parts = source.blend if isinstance(source, DataSource) else None
    contents = [files_hash(data_files(source))] if parts is None else [content_hash(part) for part in parts]
    return hashlib.sha256("\n".join([json.dumps(options, sort_keys=True), *contents]).encode()).hexdigest()


def files_hash(files: Iterable[Path]) -> str:
    """Returns one hash of many files: of their names, without folders, and their contents, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {data_file_hash(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


HASHED_WHOLE = 64 << 20
"""Bytes up to which a file is hashed whole."""

_PIECES, _PIECE = 64, 64 << 10
"""The number of pieces of a larger file that are hashed, from its beginning to its end, and the bytes of each."""


def data_file_hash(file: Path) -> str:
    """Returns `sha256:...` of a file's contents, and for a large file `sampled:...` of its size and samples from all
    over the file, so that terabytes are told apart in seconds. WorkError for a file that cannot be read."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise WorkError(f"{file}: is not a regular file; write its contents to one")
        if found.st_size <= HASHED_WHOLE:
            return file_hash(file)
        digest = hashlib.sha256(str(found.st_size).encode())
        with file.open("rb") as handle:
            for piece in range(_PIECES):
                handle.seek((found.st_size - _PIECE) * piece // (_PIECES - 1))
                digest.update(handle.read(_PIECE))
        return f"sampled:{digest.hexdigest()}"
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> WorkError:
    """Returns the error for a data file that exists and cannot be read."""
    if error.strerror is None:  # of a library that has read it, and found no sense in it
        return WorkError(f"{file}: cannot be read ({first_line(error)}); write it again, or leave it out of the data")
    return WorkError(f"{file}: cannot be read ({error.strerror}); check that the file is there and its permissions")
