"""Chooses the candidates of a search: the grid, the budget, and those that are spread over what is within it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.estimate.plan_costs import student_costs
from minitron.compiler.importance.select import leading
from minitron.compiler.plan.layer_proofs import first_provable
from minitron.compiler.plan.plan import Opened
from minitron.compiler.plan.prove import describe
from minitron.compiler.roles.names import CONVOLVED, FEED_FORWARD, GROUPS, HEADS, HIDDEN, LAYERS, SHARED
from minitron.compiler.search.budget import Flags, Limit, limits, nearest
from minitron.compiler.search.grid import Grid, Numbers, Shapes, completed, make_grid
from minitron.compiler.search.pricing import Prices, Pricing
from minitron.compiler.search.spread import farthest_first, largest, most_even, shares
from minitron.compiler.search.workload import check_workload, served
from minitron.compiler.student.targets import Targets, resolve_targets
from minitron.specs.blocks.choices import rates, sizes
from minitron.specs.blocks.search import Budget
from minitron.specs.errors import Problem, SpecInvalid, UsageError, first_line, located
from minitron.specs.halving import Rung, fitted_warmup, halving
from minitron.specs.load import LoadedSpec
from minitron.specs.search_rules import searches_shapes

# A shape that the configuration cannot express is passed over; after this many refused ones no more are tried.
MOST_REFUSED = 64


@dataclass(frozen=True)
class Candidate:
    """One student that enters the first rung. `widths` are those of every axis, `written` those that its spec would say;
    `milliseconds` a token of the budget's workload takes, an estimate."""

    number: int
    widths: Mapping[str, int]
    written: Mapping[str, int]
    costs: ModelCosts
    lr: float
    global_batch_size: int
    milliseconds: float | None = None

    def spec(self, loaded: LoadedSpec, first_rung: int) -> LoadedSpec:
        """Returns the spec as if this candidate stood in it; its hash stays that of the spec with the search."""
        spec = loaded.spec
        assert spec.distill is not None
        distill = spec.distill.chosen(self.lr, self.global_batch_size)
        steps = first_rung // (distill.sequence_length * self.global_batch_size)
        warmup = fitted_warmup(distill.optimizer.warmup_steps, steps) if steps else distill.optimizer.warmup_steps
        distill = distill.model_copy(
            update={"optimizer": distill.optimizer.model_copy(update={"warmup_steps": warmup})}
        )
        student = spec.student.model_copy(update=dict(self.written))
        own = spec.model_copy(update={"student": student, "distill": distill, "search": None})
        return replace(loaded, spec=own, written=loaded.written or loaded.spec)

    def to_json(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"lr": self.lr, "global_batch_size": self.global_batch_size}
        if self.milliseconds is not None:
            settings["milliseconds_per_token"] = round(self.milliseconds, 4)
        return {"number": self.number, "widths": dict(self.widths), **self.costs.to_json(), **settings}


@dataclass(frozen=True)
class Stage:
    """One line of the funnel: how many shapes are left by `words`."""

    words: str
    shapes: int


@dataclass(frozen=True)
class Candidates:
    """The candidates of a search, how they were found, and the rungs that choose among them."""

    found: tuple[Candidate, ...]
    funnel: tuple[Stage, ...]
    rungs: tuple[Rung, ...]

    @property
    def first_rung(self) -> int:
        """The tokens of the first rung; 0 for a single candidate, which needs no rung."""
        return self.rungs[0].tokens if self.rungs else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "funnel": [asdict(stage) for stage in self.funnel],
            "rungs": [asdict(rung) for rung in self.rungs],
            "candidates": [one.to_json() for one in self.found],
        }


def choose_candidates(loaded: LoadedSpec, opened: Opened) -> Candidates:
    """Chooses the candidates of a spec's search. Raises SpecInvalid with everything that is wrong with the spec for this
    teacher, and where no shape is within the budget, with the nearest one and the limits that exclude it."""
    spec = loaded.spec
    assert spec.search is not None and spec.distill is not None
    budget, wanted = spec.search.budget or Budget(), spec.search.candidates
    settings = [(lr, size) for lr in rates(spec.distill.optimizer.lr) for size in sizes(spec.distill.global_batch_size)]
    proposes = searches_shapes(spec)
    grid, wrong = make_grid(spec.student, opened.teacher, proposes=proposes)
    problems = [*opened.problems, *wrong, *check_workload(budget.workload)]
    if problems:
        raise SpecInvalid(located(problems, loaded))
    search = _Search(loaded, opened, budget, grid)
    shapes, funnel = search.shapes(max(1, wanted // len(settings)))
    points = np.log(np.array(settings, dtype=np.float64))
    few = [settings[index] for index in farthest_first(points, len(settings) // 2)][:wanted]
    found = [
        replace(shape, number=number, lr=lr, global_batch_size=size)
        for number, (shape, (lr, size)) in enumerate(((shape, one) for shape in shapes for one in sorted(few)), start=1)
    ]
    return Candidates(tuple(found), tuple(funnel), halving(len(found), spec.search.rank.tokens, spec.search.rank.rungs))


@dataclass(frozen=True)
class _Search:
    """The choice of shapes; `follows` are axes that others drag along, known once a configuration has shown it."""

    loaded: LoadedSpec
    opened: Opened
    budget: Budget
    grid: Grid
    follows: tuple[tuple[str, str], ...] = ()

    def shapes(self, wanted: int) -> tuple[list[Candidate], list[Stage]]:
        """Returns at most `wanted` shapes, and the funnel that they come out of."""
        teacher = self.opened.teacher
        shapes, possible = completed(self.grid.combinations(), teacher, dict(self.follows))
        prices = self._pricing.prices(shapes)
        found = list(limits(self.budget, prices))
        within = [possible & limit.within for limit in found]
        inside = possible.copy()
        for one in within:
            inside &= one
        funnel = [Stage("in the grid", len(possible))]
        if not possible.all():
            funnel.append(Stage("that can be built", int(possible.sum())))
        funnel += [Stage(limit.words, int(one.sum())) for limit, one in zip(found, within, strict=True)]
        if len(found) > 1:
            funnel.append(Stage("within all of these", int(inside.sum())))
        if not inside.any():
            raise SpecInvalid(located(self._none(shapes, possible, found), self.loaded))
        if (
            not self.grid.written
            and inside[-1]
            and all(shapes[name][-1] == width for name, width in teacher.widths.items())
        ):
            message = "the teacher itself is within the budget: nothing has to become smaller"
            raise SpecInvalid([self.loaded.error("search.budget", message, "write a smaller budget")])
        chosen: list[Candidate] = []
        refused: dict[str, int] = {}
        for index in self._order(shapes, inside, funnel):
            if len(chosen) == wanted or sum(refused.values()) == MOST_REFUSED:
                break
            outcome = self._prove({name: int(values[index]) for name, values in shapes.items()})
            if isinstance(outcome, Targets):  # axes follow others: the whole grid is priced again with them
                return self._following(outcome).shapes(wanted)
            if isinstance(outcome, str):
                refused[outcome] = refused.get(outcome, 0) + 1
            else:
                chosen.append(outcome)
        if not chosen:
            reason = next(iter(refused))
            raise SpecInvalid([self.loaded.error("student", f"none of these shapes can be built: {reason}")])
        funnel += [Stage(f"passed over: {reason}", count) for reason, count in refused.items()]
        funnel.append(Stage("enter the first rung", len(chosen)))
        return chosen, funnel

    @property
    def _pricing(self) -> Pricing:
        student, captured = self.loaded.spec.student, self.opened.teacher.captured
        kept = None
        if (layers := student.layers) is not None:
            named = set(layers.drop if layers.drop is not None else layers.keep or ())
            kept = tuple(i for i in range(captured.layer_count) if (i in named) == (layers.keep is not None))
        size = captured.dtype.itemsize
        return Pricing(self.opened.teacher, size, kept)

    def _order(self, shapes: Shapes, inside: Flags, funnel: list[Stage]) -> Iterator[int]:
        """Yields shapes within the budget in the order in which they are taken: spread over all; of a proposed grid those first
        that no larger one along an axis is within the budget beside."""
        axes = [name for name, values in self.grid.values.items() if len(values) > 1]
        sizes_of = [len(values) for values in self.grid.values.values()] or [1]
        pool, first = inside.copy(), True
        while pool.any():
            front = pool if self.grid.written else largest(pool, sizes_of)
            if first and not self.grid.written:
                funnel.append(Stage("with no larger one within the budget", int(front.sum())))
            places = np.flatnonzero(front)
            points = shares({name: values[places] for name, values in shapes.items()}, self.opened.teacher.widths, axes)
            for place in farthest_first(points, most_even(points)):
                yield int(places[place])
            pool, first = pool & ~front, False

    def _prove(self, widths: dict[str, int]) -> Candidate | Targets | str:
        """Returns the candidate of a shape, priced exactly; why it cannot be one; or its targets where other axes follow."""
        teacher = self.opened.teacher
        written = {name: widths[name] for name in self.grid.values}
        student = self.loaded.spec.student.model_copy(update=written)
        targets, problems = resolve_targets(student, teacher)
        if targets is None:
            return problems[0].message
        leads, contiguous = leading(targets, teacher.roles).layers, self.loaded.spec.importance.depth.contiguous
        try:
            layers, proven, config, model = first_provable(teacher, targets, leads, describe, contiguous=contiguous)
        except UsageError as error:
            return first_line(error)
        if proven.widths != targets.widths and not self.follows:
            return proven
        costs = student_costs(teacher, proven, layers, config, model)
        exact = _prices_of(costs)
        if beyond := [limit for limit in limits(self.budget, exact) if not limit.within[0]]:
            return f"beyond {beyond[0].words} once it is built"
        work = self.budget.workload
        milliseconds = None if work is None else float(served(work, exact).milliseconds[0])
        whole = {**teacher.widths, **proven.widths, LAYERS: proven.layers}
        return Candidate(0, whole, written, costs, 0.0, 0, milliseconds)

    def _following(self, targets: Targets) -> _Search:
        """The search with the axes that follow others in `targets`, and are not searched themselves."""
        widths = self.opened.teacher.widths
        follows = []
        for axis in targets.widths.keys() - self.grid.values.keys() - {HEADS, GROUPS, SHARED}:
            alike = (name for name in FEED_FORWARD if name in self.grid.values and widths[name] == widths[axis])
            follows.append((axis, HIDDEN if axis == CONVOLVED else next(alike)))
        return replace(self, follows=tuple(sorted(follows)))

    def _none(self, shapes: Shapes, possible: Flags, found: Sequence[Limit]) -> list[Problem]:
        """The problem of a grid without a shape within the budget."""
        if not possible.any():
            message = (
                f"none of the {len(possible)} combinations can be built: query heads do not divide into their groups"
            )
            return [Problem("student", message, "write other numbers of heads or groups")]
        places = np.flatnonzero(possible)
        among = [replace(limit, excess=limit.excess[places], values=limit.values[places]) for limit in found]
        best = nearest(among)
        shape = ", ".join(f"{name}: {int(shapes[name][places[best]])}" for name in self.grid.values)
        over = [limit for limit in among if limit.excess[best] > 0]
        said = " and ".join(f"{limit.written(best)} is not {limit.words}" for limit in over)
        message = f"no shape of {len(places)} is within the budget; the nearest is {{{shape}}}, whose {said}"
        at = f"search.budget.{over[0].path}" if len(over) == 1 else "search.budget"
        return [Problem(at, message, "write another limit, or other widths under `student`")]


def _prices_of(model: ModelCosts) -> Prices:
    def one(value: int) -> Numbers:
        return np.array([value], np.int64)

    return Prices(
        one(model.parameters),
        one(model.active_parameters),
        one(model.weight_bytes),
        one(model.kv_cache_bytes_per_token),
        one(model.flops_per_token),
        one(model.attention_flops_per_pair),
    )
