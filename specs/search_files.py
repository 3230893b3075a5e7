"""The files of BUILD/search: search.json, which the compiler writes and the runtime carries out, and ranking.json, its result.

BUILD/search/
    search.json      the candidates with their optimizers, and the rungs
    training.yaml    what all candidates share: teacher, data, loss, held-out text
    tokenizer/       the teacher's
    07/student       the pruned student of candidate 7; 07/checkpoints its training; both go when the candidate is out
    07/coordinates.safetensors   what candidate 7 keeps of the teacher's hidden states, where these are compared
    07/rung-2.json   how it was judged after the second rung
    ranking.json     every candidate's figures, and the winner
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from minitron.specs.atomic import write_text
from minitron.specs.blocks.base import Block, Count, NonNegativeInt, PositiveInt, Text
from minitron.specs.blocks.distill import HiddenStateLoss
from minitron.specs.blocks.training import Optimizer
from minitron.specs.builds import RANKING, SEARCH, SEARCH_PLAN
from minitron.specs.load import LoadedSpec

FORMAT_VERSION = 1


class RungPlan(Block):
    """One rung: candidates are trained up to `tokens`, counted from their beginning, and the best `leave` stay."""

    number: PositiveInt
    tokens: Count
    enter: PositiveInt
    leave: PositiveInt


class CandidatePlan(Block):
    """One candidate: its student's folder and identity, and its training."""

    number: PositiveInt
    fingerprint: Text
    figures: dict[str, Any]
    """Widths and costs, as the plan has them."""

    parameters: PositiveInt
    optimizer: Optimizer
    global_batch_size: PositiveInt
    hidden_states: HiddenStateLoss | None = None
    """The comparison of hidden states, with the layers that this candidate keeps."""

    kept_coordinates: Text | None = None
    """The file, in that of the search, of what the candidate keeps of the teacher's hidden states."""

    @property
    def folder(self) -> str:
        """The name of the candidate's folder in that of the search."""
        return f"{self.number:02d}"


class SearchFile(Block):
    """search.json."""

    format_version: int = FORMAT_VERSION
    identity: Text
    """Hash of what the spec says of the search (`search_identity`)."""

    inputs: dict[str, Any]
    """Teacher, tokenizer and data, as plan.json has them."""

    candidates: tuple[CandidatePlan, ...] = Field(strict=False)
    rungs: tuple[RungPlan, ...] = Field(strict=False)
    judged_tokens: PositiveInt
    """At most this many tokens of the held-out text judge a candidate."""


class Judged(Block):
    """The figures of a candidate on the held-out text, in nats a token; null where its training diverged.

    `kl` and `loss` are those of the branch whose learning rate decayed to zero over the last tenth of the rung, `trunk_kl` that
    of the student that goes on.
    """

    tokens: NonNegativeInt
    kl: float | None
    loss: float | None
    trunk_kl: float | None = None


class Ranked(Block):
    """One candidate's figures: before any training, and after each rung that it was in."""

    number: PositiveInt
    zero_shot: Judged
    rungs: tuple[Judged, ...] = Field(default=(), strict=False)


class Ranking(Block):
    """ranking.json. The candidates stand in the order of search.json; `winner` is known once all rungs are done."""

    format_version: int = FORMAT_VERSION
    identity: Text
    inputs: dict[str, Any]
    candidates: tuple[Ranked, ...] = Field(strict=False)
    winner: PositiveInt | None = None

    def of(self, number: int) -> Ranked:
        """Returns the figures of a candidate."""
        return next(one for one in self.candidates if one.number == number)


def table(candidates: Iterable[Mapping[str, Any]], ranking: Ranking | None) -> list[dict[str, Any]]:
    """Returns every candidate with its figures and, as far as they are known, how it was judged: the table that plan.json and
    results.json hold."""
    rows = []
    for one in candidates:
        row = dict(one) | {"zero_shot": None, "rungs": []}
        if ranking is not None:
            ranked = ranking.of(row["number"])
            row |= {"zero_shot": ranked.zero_shot.model_dump(), "rungs": [rung.model_dump() for rung in ranked.rungs]}
        rows.append(row)
    return rows


def best_first(judged: dict[int, Judged]) -> list[int]:
    """Returns candidates by their divergence, the lowest first; of equal ones the lower number; diverged ones last."""

    def key(number: int) -> tuple[bool, float, int]:
        kl = judged[number].kl
        return kl is None, kl or 0.0, number

    return sorted(judged, key=key)


def read_search(build: Path) -> SearchFile | None:
    """Returns the content of search.json; None where it is missing or of a format that this version does not read."""
    found: SearchFile | None = _read(build / SEARCH / SEARCH_PLAN, SearchFile)
    return found


def read_ranking(build: Path, identity: str | None = None) -> Ranking | None:
    """Returns the content of ranking.json; None where there is none, or not one of the search with this identity."""
    found: Ranking | None = _read(build / SEARCH / RANKING, Ranking)
    return found if found is not None and identity in (None, found.identity) else None


def search_identity(loaded: LoadedSpec) -> str:
    """Returns a hash of everything in a spec that decides the search; how long the winner is trained, and what is measured
    of it, does not, unless a weight of the loss falls to 0 over the training."""
    resolved = loaded.resolved
    hidden = ((resolved["distill"] or {}).get("loss") or {}).get("hidden_states") or {}
    free = ("checkpoint", "layout") if hidden.get("schedule") == "linear" else ("tokens", "checkpoint", "layout")
    kept = {
        key: resolved[key] for key in ("teacher", "student", "importance", "recovery", "search", "teacher_correction")
    }
    kept["distill"] = {key: value for key, value in (resolved["distill"] or {}).items() if key not in free}
    kept["evaluate"] = {key: (resolved["evaluate"] or {}).get(key) for key in ("held_out", "max_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _read(path: Path, kind: Any) -> Any:
    try:
        found = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return found if found.format_version == FORMAT_VERSION else None


def write_model_file(path: Path, model: Block) -> None:
    """Writes one of these documents, whole or not at all."""
    write_text(path, model.model_dump_json(indent=1) + "\n")
