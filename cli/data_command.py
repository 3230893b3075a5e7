"""The command that shows the data of a spec as training will read them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from minitron.cli import figures, options
from minitron.cli.output import progress as shown_progress
from minitron.cli.render import show_sections
from minitron.cli.sections import Column, Document, Section, entries, part
from minitron.specs import load_spec

_SHOWN = 160  # characters of a sample


def data(
    spec: options.SpecFile,
    overrides: options.Overrides = None,
    as_json: options.Json = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Read all of the data; a few megabytes of each source without it.")
    ] = False,
) -> None:
    """Show what training will see of the data: documents, tokens, samples, and what is left out."""
    loaded = load_spec(spec, overrides or ())
    from minitron.cli.libraries import quiet_libraries

    quiet_libraries()
    from minitron.compiler.data_report import describe_data
    from minitron.specs.lockfile import with_lock

    content = describe_data(with_lock(loaded), shown_progress(), everything=everything)
    show_sections(data_sections(content), content, as_json=as_json)


def data_sections(content: Document) -> list[Section]:
    """Returns a section for each source, with a line for each of its parts and, below the table, what a user should
    know.
    """
    return [_source(at, source) for at, source in part(content, "sources").items()]


def _source(at: str, source: Document) -> Section:
    columns = (
        Column("source"), Column("share", right=True), Column("documents", right=True), Column("tokens", right=True),
        Column("learnt", right=True), Column("repeats", right=True), Column("empty", right=True),
        Column("unreadable", right=True),
    )  # fmt: skip
    rows, notes = [], []
    for one in entries(source, "parts"):
        tokens = one["estimated_tokens"]
        about = "" if one["complete"] else "about "
        rows.append((
            str(one["source"]), f"{one['share']:.1%}",
            figures.count(one["documents"]) if one["complete"] else f"{figures.count(one['documents'])} read",
            figures.NOTHING if tokens is None else f"{about}{figures.count(tokens)}",
            f"{one['learnt_tokens'] / max(1, one['tokens']):.1%}",
            figures.NOTHING if one["repeats"] is None else f"{one['repeats']:.2f}",
            str(one["empty"]), str(one["unreadable"]),
        ))  # fmt: skip
        notes += list(_notes(one, source))
    return Section(at, columns, tuple(rows), tuple(notes))


def _notes(one: Document, source: Document) -> Any:
    name = one["source"]
    if one["documents_over_a_sequence"]:
        yield (
            f"{name}: {one['documents_over_a_sequence']} documents are longer than a sequence of "
            f"{source['sequence_length']} tokens and go on in the next; the longest has {one['longest_document']}"
        )
    if one["repaired"]:
        yield f"{name}: in {one['repaired']} documents halves of surrogate pairs were replaced by U+FFFD"
    yield from (f"{name}: left out: {reason}" for reason in one["reasons"])
    for number, sample in enumerate(one["samples"], 1):
        shown = sample.replace("\n", "\\n")
        yield f"{name}: sample {number}: {shown[:_SHOWN]}{'...' if len(shown) > _SHOWN else ''}"
