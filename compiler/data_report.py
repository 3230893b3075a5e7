"""Describes the data that training, calibration and evaluation will read from a spec's sources: `minitron data`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.compiler.plan.checks import teacher_key
from minitron.compiler.planning import make_plan
from minitron.compiler.teacher.open_teacher import open_teacher
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.specs.blocks.base import EVALUATED_SEQUENCE
from minitron.specs.data import DataSource, Source
from minitron.specs.data_files import resolve_data
from minitron.specs.documents.readers import describe
from minitron.specs.encoding import Encoder, recipe_of
from minitron.specs.encoding.survey import SURVEYED, Survey, survey
from minitron.specs.errors import SpecInvalid, WorkError, placing
from minitron.specs.fit_lengths import fit_lengths
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import source_parts
from minitron.specs.model_config import positions_of
from minitron.specs.progress import Progress


def describe_data(loaded: LoadedSpec, progress: Progress, *, everything: bool = False) -> dict[str, Any]:
    """The document of `minitron data --json`: for each source that the spec names the figures of its parts and the
    first samples as the tokenizer gives them back. A few megabytes of each part are read, or all of it.

    SpecInvalid for data or a tokenizer that is not there, with the place; the same for documents that cannot be read.
    """
    sources = resolve_data(loaded)
    if not sources:
        raise SpecInvalid(
            [loaded.error("", "names no data", "add `importance.data`, `distill.data` or `evaluate.held_out`")]
        )
    checkpoint = open_teacher(loaded, weights=False, planned=lambda upper, build: make_plan(upper, build=build).config)
    positions = positions_of(checkpoint.config)
    loaded = fit_lengths(loaded, positions)
    with placing(loaded, teacher_key(loaded)):
        tokenizer = load_tokenizer(checkpoint.folder)
    encoder = Encoder(recipe_of(tokenizer), tokenizer)
    characters = None if everything else SURVEYED
    found = {}
    with progress.task("data", len(sources), "sources") as task:
        for at, source in sources.items():
            found[at] = _source(loaded, at, source, _needs(loaded, at, positions), encoder, tokenizer, characters)
            task.advance(1)
    recipe = encoder.recipe
    return {
        "name": loaded.spec.name,
        "tokenizer": {
            "vocabulary": len(tokenizer),
            "bos": None if recipe.bos is None else tokenizer.convert_ids_to_tokens(recipe.bos),
            "eos": None if recipe.eos is None else tokenizer.convert_ids_to_tokens(recipe.eos),
            "chat_template": recipe.template is not None,
        },
        "sources": found,
    }


def _source(
    loaded: LoadedSpec,
    at: str,
    source: DataSource,
    needs: tuple[int, int],
    encoder: Encoder,
    tokenizer: Any,
    characters: int | None,
) -> dict[str, Any]:
    length, wanted = needs
    parts = list(source_parts(at, source))
    whole = sum(part.share for _, _, part in parts)
    described = []
    for path, _, part in parts:
        with placing(loaded, path, (WorkError,)):
            figures = survey(part, encoder, length, characters=characters)
        described.append(_part(part, figures, tokenizer, part.share / whole, wanted))
    return {"sequence_length": length, "tokens_wanted": wanted, "parts": described}


def _needs(loaded: LoadedSpec, at: str, positions: int | None) -> tuple[int, int]:
    """Returns (tokens in a sequence, tokens that are read) of a source; `positions` are those that the teacher reads."""
    spec = loaded.spec
    if at == "importance.data":
        data = spec.importance.data
        assert data is not None
        return data.sequence_length, data.samples * data.sequence_length
    alone = min(EVALUATED_SEQUENCE, positions or EVALUATED_SEQUENCE)
    length = spec.distill.sequence_length if spec.distill is not None else alone
    if at == "distill.data":
        assert spec.distill is not None
        return length, spec.distill.tokens
    if at.startswith("distill.phases."):
        assert spec.distill is not None
        phase = spec.distill.phases[int(at.split(".")[2])]
        return phase.sequence_length or length, phase.tokens
    assert spec.evaluate is not None
    return length, spec.evaluate.max_tokens


def _part(part: Source, found: Survey, tokenizer: Any, share: float, wanted: int) -> dict[str, Any]:
    tally, tokens = found.tally, found.estimated_tokens
    return {
        "source": _name(part),
        "share": round(share, 6),
        "complete": found.complete,
        "documents": tally.documents,
        "tokens": found.tokens,
        "estimated_tokens": tokens,
        "repeats": round(share * wanted / tokens, 3) if tokens else None,
        "learnt_tokens": found.learnt,
        "documents_over_a_sequence": found.split,
        "longest_document": found.longest,
        "empty": tally.empty,
        "unreadable": tally.skipped,
        "repaired": tally.repaired,
        "reasons": list(tally.reasons),
        "samples": [str(tokenizer.decode(ids.tolist())) for ids in found.samples],
    }


def _name(part: Source) -> str:
    """Returns the name of a part as the spec writes it, without the folders of this machine."""
    value = getattr(part, part.kind)
    names = list(_names(value))
    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"{part.kind}: {shown}" if shown else describe(part)


def _names(value: Any) -> Iterator[str]:
    for one in (value,) if isinstance(value, str) else value:
        yield Path(one).name if Path(one).is_absolute() else str(one)
