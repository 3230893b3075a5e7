"""Finds the files of a data source: what a pattern names, and a hash of everything that decides the documents."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from minitron.specs.data import STDLIB_PREFIX, DataSource, Source
from minitron.specs.errors import Problem, Refused, SpecError, WorkError, located
from minitron.specs.load import LoadedSpec
from minitron.specs.spec import Spec

S = TypeVar("S", bound=Source)


def resolve(source: S, folder: Path, *, at: str = "data") -> S:
    """The source with every pattern replaced by the files it names: absolute, sorted, each once.

    Relative patterns start at `folder`. The standard library stays a word: it is another folder on every machine.
    Refused, with a problem for every pattern that names nothing; `at` is the dotted path of the source.
    """
    problems: list[Problem] = []
    resolved = _resolved(source, folder, at, problems)
    if problems:
        raise Refused(problems)
    return resolved


def check_data(loaded: LoadedSpec) -> list[SpecError]:
    """What is wrong with the data that a spec names: all of it, at its places."""
    problems: list[Problem] = []
    for at, source in data_sources(loaded.spec):
        _resolved(source, loaded.folder, at, problems)
    evaluate = loaded.spec.evaluate
    if evaluate is not None and evaluate.data_dir is not None and not (loaded.folder / evaluate.data_dir).is_dir():
        message = f"there is no folder `{evaluate.data_dir}`"
        problems.append(Problem("evaluate.data_dir", message, f"paths are relative to {loaded.folder.absolute()}"))
    return located(problems, loaded)


def data_sources(spec: Spec) -> Iterator[tuple[str, DataSource]]:
    """(dotted path, source) of all data that a spec names."""
    if spec.importance.data is not None:
        yield "importance.data", spec.importance.data
    if spec.distill is not None:
        yield "distill.data", spec.distill.data
    if spec.evaluate is not None and spec.evaluate.held_out is not None:
        yield "evaluate.held_out", spec.evaluate.held_out


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
    """The absolute files of a pattern, sorted. FileNotFoundError(message, hint) where there are none."""
    if pattern.startswith(STDLIB_PREFIX):
        return [pattern]
    path = folder.absolute() / pattern
    if path.is_file():  # before patterns: brackets may stand in a file's own name
        return [str(path)]
    if path.is_dir():
        raise FileNotFoundError(
            f"`{pattern}` is a folder", f"name the files in it, such as {pattern.rstrip('/')}/**/*.txt"
        )
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


def _dataset(name: str, folder: Path, at: str, problems: list[Problem]) -> str:
    path = folder.absolute() / name
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/")):
        message = f"there is no folder `{name}`"
        problems.append(Problem(f"{at}.dataset", message, f"paths are relative to {folder.absolute()}"))
    return name


def data_files(source: Source) -> list[Path]:
    """The files that a resolved source is read from, in the order of reading; none for a data set of the Hub."""
    if isinstance(source, DataSource) and source.blend is not None:
        return [file for part in source.blend for file in data_files(part)]
    if source.dataset is not None:
        folder = Path(source.dataset)
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_absolute() else []
    files: list[Path] = []
    for entry in getattr(source, source.kind):
        files += stdlib(entry) if entry.startswith(STDLIB_PREFIX) else [Path(entry)]
    return files


def stdlib(entry: str) -> list[Path]:
    from minitron.specs.stdlib_corpus import stdlib_files

    return stdlib_files("train" if entry == f"{STDLIB_PREFIX}train" else "held_out")


def content_hash(source: Source) -> str:
    """A hash of everything that decides the documents of a resolved source: options, file names and contents.

    Folders do not count, so the same data has the same hash on another machine. Of a data set on the Hub only its id,
    split and revision are known without reading it.
    """
    digest = hashlib.sha256()
    # Files count by name and content, parts of a blend by their own hash, and how much of the data is read not at all.
    elsewhere = {"text", "jsonl", "parquet", "blend", "samples", "sequence_length"}
    options = {key: value for key, value in source.model_dump(mode="json").items() if key not in elsewhere}
    if source.dataset is not None and data_files(source):
        options["dataset"] = "folder"
    digest.update(json.dumps(options, sort_keys=True).encode())
    if isinstance(source, DataSource) and source.blend is not None:
        for part in source.blend:
            digest.update(content_hash(part).encode())
        return digest.hexdigest()
    for file in data_files(source):
        try:
            with file.open("rb") as handle:
                contents = hashlib.file_digest(handle, "sha256")
        except OSError as error:
            raise unreadable(file, error) from None
        digest.update(f"\n{contents.hexdigest()} {file.name}".encode())
    return digest.hexdigest()


def unreadable(file: Path, error: OSError) -> WorkError:
    """The error of a data file that was there and cannot be read."""
    return WorkError(f"{file}: cannot be read ({error.strerror}); check that the file is there and its permissions")
