"""Plans a spec, whatever it asks for: one student, or a search whose candidates are students."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron.compiler.plan import plan as of_one
from minitron.compiler.plan.plan import Opened, Plan
from minitron.compiler.search.candidates import Candidate, Candidates, choose_candidates
from minitron.compiler.search.forecast import Forecast, forecast
from minitron.compiler.teacher.provenance import data_at_commits
from minitron.specs.builds import PLAN, read_document
from minitron.specs.errors import UsageError
from minitron.specs.load import LoadedSpec
from minitron.specs.search_files import Ranking, read_ranking, search_identity, table


@dataclass(frozen=True)
class SearchPlan:
    """A spec with a search: its open teacher and its candidates. The plan of each is made when it is asked for."""

    loaded: LoadedSpec
    build: Path
    opened: Opened
    candidates: Candidates

    def candidate(self, number: int) -> Candidate:
        """Returns a candidate by its number, from 1; UsageError for a number without a candidate."""
        found = self.candidates.found
        if not 1 <= number <= len(found):
            raise UsageError(f"there is no candidate {number}; write a number from 1 to {len(found)}")
        return found[number - 1]

    def plan(self, number: int) -> Plan:
        """Returns the plan of a candidate as if it stood in the spec, with the search in its document."""
        loaded = self.candidate(number).spec(self.loaded, self.candidates.first_rung)
        plan = of_one.plan_student(loaded, self.build, self.opened)
        return replace(plan, search=self.to_json() | {"candidate": number})

    def to_json(self) -> dict[str, Any]:
        """Returns the `search` of a plan: the funnel, the rungs, and every candidate as far as it is known."""
        document = self.candidates.to_json()
        ranking = read_ranking(self.build, search_identity(self.loaded))
        known = None if ranking is None or len(ranking.candidates) != len(self.candidates.found) else ranking
        winner = None if known is None else known.winner
        document |= {"candidates": table(document["candidates"], known), "winner": winner}
        if known is not None and (expected := self._forecast(known)) is not None:
            document["forecast"] = expected.to_json()
        return document

    def _forecast(self, ranking: Ranking) -> Forecast | None:
        """Returns what the whole training is expected to reach, from the candidate that came farthest."""
        distill = self.loaded.spec.distill
        assert distill is not None, "a search distils"
        best = max(
            ranking.candidates, key=lambda one: (len(one.rungs), -(one.rungs[-1].kl or 0.0) if one.rungs else 0.0)
        )
        return forecast([(rung.tokens, rung.kl) for rung in best.rungs if rung.kl is not None], distill.tokens)


def make_search(loaded: LoadedSpec, *, build: Path, weights: bool = False) -> SearchPlan:
    """Resolves a spec that has a search. Raises SpecInvalid as `make_plan` does."""
    loaded = data_at_commits(loaded) if weights else loaded
    opened = of_one.open_spec(loaded, weights=weights)
    return SearchPlan(loaded, build, opened, choose_candidates(loaded, opened))


def make_plan(loaded: LoadedSpec, *, build: Path, weights: bool = False) -> Plan:
    """Resolves a spec. Raises SpecInvalid with every error of the spec, each at its place.

    The plan of a search is that of one candidate: of the one that the build holds or its rungs have chosen, else of the first.
    Without `weights` the configuration and whatever weight headers are there suffice; with it the plan can be compiled.
    """
    if loaded.spec.search is None:
        return of_one.make_plan(data_at_commits(loaded) if weights else loaded, build=build, weights=weights)
    return make_search(loaded, build=build, weights=weights).plan(chosen_before(loaded, build) or 1)


def chosen_before(loaded: LoadedSpec, build: Path) -> int | None:
    """Returns the candidate that a build of this very spec was compiled from, else the one that its rungs have chosen; None
    where neither is known."""
    document = read_document(build / PLAN) or {}
    if (document.get("spec") or {}).get("sha256") == loaded.sha256:
        number = (document.get("search") or {}).get("candidate")
        if isinstance(number, int):
            return number
    ranking = read_ranking(build, search_identity(loaded))
    return None if ranking is None else ranking.winner
