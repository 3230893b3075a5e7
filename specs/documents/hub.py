"""Reads data sets of the Hugging Face Hub, and folders that hold one, with the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minitron.specs.data import Source
from minitron.specs.documents.opening import packages_missing
from minitron.specs.errors import WorkError, first_line

_COMMIT = re.compile("[0-9a-f]{40}")


def dataset_rows(source: Source) -> Iterator[tuple[Any, str]]:
    """Yields (row, place) of the source's split, which streaming fetches while rows are read."""
    rows, read = iter(_load(source)), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in `_load`
            raise WorkError(
                f"the data set {source.dataset} cannot be read after {read} rows ({first_line(error)}); check the network and "
                "run the command again, or write a folder that holds the data"
            ) from None
        read += 1
        yield row, f"data set {source.dataset} row {read}"


def _load(source: Source) -> Iterable[Any]:
    assert source.dataset is not None and source.split is not None
    try:
        import datasets
    except ImportError:
        raise packages_missing("reading data sets") from None
    folder = Path(source.dataset)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            loaded: Any = datasets.load_from_disk(source.dataset)
        else:
            loaded = datasets.load_dataset(
                source.dataset,
                source.subset,
                split=None if folder.is_absolute() else source.split,
                revision=source.revision,
                streaming=bool(source.streaming),
            )
    except Exception as error:  # the library raises a dozen kinds, from several packages, for data that cannot be read
        raise WorkError(
            f"the data set {source.dataset} cannot be loaded ({first_line(error)}); check its name, `subset`, `split` and "
            "`revision`, and the network; without a network, write a folder that holds it"
        ) from None
    if not folder.is_absolute():
        _check_revision(loaded, source)
    # Of a folder all splits are there, or it is one by itself, whatever the split is called.
    if isinstance(loaded, dict):
        return _split(loaded, source)
    if saved and _sliced(source.split):
        return _split({source.split.partition("[")[0]: loaded}, source)
    return loaded  # type: ignore[no-any-return]


def _check_revision(loaded: Any, source: Source) -> None:
    """Checks that a data set of the Hub is of the revision that was asked for: without a network the library takes the newest
    copy in its cache, whatever was asked. WorkError where it is of another."""
    commit = _commit(source)
    copies = {Path(file["filename"]).parent.name for file in getattr(loaded, "cache_files", ())}
    others = sorted(name for name in copies if _COMMIT.fullmatch(name) and name != commit)
    if source.revision is None or not others:
        return
    if commit is None:
        import datasets

        if not datasets.config.HF_HUB_OFFLINE:  # then the Hub itself has said which commit it is
            return
    raise WorkError(
        f"the data set {source.dataset} is in the cache as of commit {others[0]}, and `revision` asks for {source.revision}; "
        "go online, or write `revision` with what is there"
    )


def _commit(source: Source) -> str | None:
    """Returns the commit of the source's revision, as far as huggingface_hub knows it here; None where it does not."""
    if source.revision is None or _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=str(source.dataset), repo_type="dataset")
    try:
        return (folder / "refs" / source.revision).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _sliced(split: str) -> bool:
    return "[" in split or "+" in split


def _split(loaded: dict[str, Any], source: Source) -> Iterable[Any]:
    """Selects a split from the loaded ones, or combines them as `train[:50%]` and `train+test` say."""
    import datasets

    wanted = str(source.split)
    there = ", ".join(f"`{name}`" for name in loaded)
    if wanted in loaded:
        return loaded[wanted]  # type: ignore[no-any-return]
    if not _sliced(wanted):
        raise WorkError(f"the data set {source.dataset} has no split `{wanted}`; write one of {there}")
    if source.streaming:
        raise WorkError(
            f"the data set {source.dataset} is streamed, and `{wanted}` needs its length; write one of {there}, or "
            "`streaming: false`"
        )
    try:
        sizes = {name: len(part) for name, part in loaded.items()}
        spans = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
    except Exception as error:
        raise WorkError(
            f"the data set {source.dataset} has no split `{wanted}` ({first_line(error)}); write one of {there}, or a part of "
            "one such as train[:50%]"
        ) from None
    parts = [loaded[span.splitname] for span in spans]
    chosen = [
        part.select(range(span.from_ or 0, len(part) if span.to is None else span.to))
        for span, part in zip(spans, parts, strict=True)
    ]
    return datasets.concatenate_datasets(chosen)  # type: ignore[no-any-return]
