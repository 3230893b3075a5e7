"""The command for the cache beside the builds: list what is in it, and remove what is no longer used."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from minitron.cli import figures, options
from minitron.cli.render import say, show_sections
from minitron.cli.sections import Column, Section
from minitron.specs.cache import NO_CACHE, VARIABLE, Entry, abandoned, cache_folder, discard, entries, remove
from minitron.specs.errors import UsageError

_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def cache(
    folder: Annotated[
        Path, typer.Argument(metavar="BUILDS", help="The folder that holds the builds; builds/ by default.")
    ] = Path("builds"),
    prune: Annotated[bool, typer.Option("--prune", help="Remove the entries; all of them without --unused.")] = False,
    unused: Annotated[
        str | None, typer.Option("--unused", metavar="TIME", help="Only those not used for that long: 30d, 12h.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the cache that builds share (scores, tokens, teacher logits, checks), or remove what is not used.

    Builds stay whole without it; what is missing is made again when it is needed. --prune also removes what killed
    processes left half-written a day ago or more."""
    place = cache_folder(folder / "any")
    if place is None:
        raise UsageError(f"{VARIABLE} is {NO_CACHE}: there is no cache; unset it, or name a folder")
    before = time.time() - (0 if unused is None else _seconds(unused))
    found = [one for one in entries(place) if unused is None or one.used < before]
    if prune:
        for one in found:
            remove(one)
        for path in abandoned(place):
            discard(path)
    listed = [{"kind": one.kind, "path": str(one.path), "bytes": one.bytes, "used": one.used} for one in found]
    content = {"cache": str(place), "removed": prune, "entries": listed}
    if not found and not as_json:
        say(f"{place}: there is nothing" + ("" if unused is None else f" that was not used for {unused}"))
        return
    show_sections([_section(place, found, removed=prune)], content, as_json=as_json)


def _section(place: Path, found: list[Entry], *, removed: bool) -> Section:
    columns = (Column("kind"), Column("entry"), Column("size", right=True), Column("last used", right=True))
    now = time.time()
    rows = tuple(
        (one.kind, one.path.stem[:24], figures.size(one.bytes), f"{figures.about(now - one.used)} ago") for one in found
    )
    total = figures.size(sum(one.bytes for one in found))
    note = f"{total} removed" if removed else f"{total}; the same with --prune removes it"
    return Section(f"Cache {place}", columns, rows, (note,))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dhms])", text.strip())
    if match is None:
        raise UsageError(f"--unused {text}: not a time; write 30d, 12h or 90m")
    return float(match.group(1)) * _SECONDS[match.group(2)]
