"""The data of a training beside what the spec asks for: how much there is, and how often it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.teacher.tokenizer import load_tokenizer, tokenizer_files
from minitron.specs.blocks.distill import Distill
from minitron.specs.data import MOST_PASSES, Source
from minitron.specs.data_files import data_files, resolve, sources_as_read
from minitron.specs.encoding import Encoder, recipe_of
from minitron.specs.encoding.pool import process_memory
from minitron.specs.encoding.survey import survey
from minitron.specs.errors import MinitronError
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import source_parts

_MOST = 0.9  # of a source: the number of its tokens is an estimate

_SURVEYED = 100_000  # characters of each source that are tokenized for a plan: a tenth of a second
_WIDE, _NARROW_IDS = 4, 1 << 16  # bytes of a token id on disk, 2 for vocabularies up to the second


@dataclass(frozen=True)
class DataUse:
    """One source of the training: its files, their bytes, about how many tokens they hold (None where that cannot be
    told without reading all), how many of them the training reads, the bytes of the tokens on disk, and the memory of each
    process that tokenizes, one a core."""

    source: str
    files: int
    bytes: int
    tokens: int | None
    read: int
    disk_bytes: int | None
    process_bytes: int | None

    @property
    def passes(self) -> float | None:
        return None if not self.tokens else self.read / self.tokens

    def written(self, tokens: int) -> DataUse:
        """Returns the use where only `tokens` tokens are written to disk."""
        return replace(self, disk_bytes=round((self.disk_bytes or 0) * tokens / (self.tokens or 1)))

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "files": self.files,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "read_tokens": self.read,
            "passes": None if self.passes is None else round(self.passes, 2),
            "disk_bytes": self.disk_bytes,
            "process_bytes": self.process_bytes,
        }


def data_use(loaded: LoadedSpec, checkpoint: Checkpoint) -> tuple[DataUse, ...]:
    """Estimates the use of the training's data from its files' sizes and its first documents; empty where nothing is trained
    or the files are not there."""
    return tuple(_uses(loaded, checkpoint))


def repeated(uses: tuple[DataUse, ...]) -> Iterator[str]:
    """Yields a remark for each source that is read more often than pays."""
    for one in uses:
        if one.passes is not None and one.passes > MOST_PASSES:
            yield (
                f"{one.source} is read {one.passes:.1f} times over: about {one.tokens:,} tokens are there, and "
                f"{one.read:,} are trained on; more than {MOST_PASSES} passes teach little (arXiv 2305.16264), name more "
                "data or fewer tokens"
            )


def unread(uses: tuple[DataUse, ...], distill: Distill | None) -> Iterator[str]:
    """Yields a remark for each source of which training in blocks reads the beginning alone."""
    for one in uses if distill is not None and distill.shuffle != "all" else ():
        if one.passes is not None and one.passes < _MOST:
            yield (
                f"{one.source}: training reads about {one.passes:.0%} of its tokens, those at its beginning, as "
                "`distill.shuffle` goes block by block; `shuffle: all` draws from all of it"
            )


def _uses(loaded: LoadedSpec, checkpoint: Checkpoint) -> Iterator[DataUse]:
    distill, sources = loaded.spec.distill, dict(sources_as_read(loaded.spec))
    if distill is None:
        return
    for at, wanted in _wanted(distill).items():
        try:
            parts = list(source_parts(at, resolve(sources[at], loaded.folder)))
            encoder = _encoder(checkpoint)
        except MinitronError:
            continue  # reported with what is wrong
        for one in _parts(parts, wanted, encoder, checkpoint, distill.sequence_length):
            yield one if distill.shuffle == "all" or not one.tokens else one.written(min(one.tokens, one.read))


def _wanted(distill: Distill) -> dict[str, int]:
    """Returns the tokens that the training reads of each of its sources, by dotted path."""
    if not distill.phases:
        return {"distill.data": distill.trained_tokens}
    wanted: dict[str, int] = {}
    for number, phase in enumerate(distill.phases):
        at = "distill.data" if phase.data is None else f"distill.phases.{number}.data"
        wanted[at] = wanted.get(at, 0) + distill.alone(phase).trained_tokens
    return wanted


def _parts(
    parts: Sequence[tuple[str, str, Source]], wanted: int, encoder: Encoder | None, checkpoint: Checkpoint, length: int
) -> Iterator[DataUse]:
    whole = sum(part.share for _, _, part in parts)
    for at, _, part in parts:
        files = data_files(part)
        if not files:
            continue  # a data set of the Hub
        tokens = _tokens(part, encoder, length)
        wide = _WIDE if int(checkpoint.config.vocab_size) > _NARROW_IDS else _WIDE // 2
        size = sum(file.stat().st_size for file in files)
        read = round(wanted * part.share / whole)
        memory = None if encoder is None else process_memory(encoder.recipe)
        yield DataUse(at, len(files), size, tokens, read, None if tokens is None else tokens * wide, memory)


def _encoder(checkpoint: Checkpoint) -> Encoder | None:
    if not any(tokenizer_files(checkpoint.folder)):
        return None
    tokenizer = load_tokenizer(checkpoint.folder)
    return Encoder(recipe_of(tokenizer), tokenizer)


def _tokens(part: Source, encoder: Encoder | None, length: int) -> int | None:
    """Estimates the tokens of a source. Chats are rendered in a process of their own, which a plan does not wait for."""
    if encoder is None or part.messages_field is not None or part.prompt_field is not None:
        return None
    try:
        return survey(part, encoder, length, characters=_SURVEYED).estimated_tokens
    except MinitronError:
        return None
