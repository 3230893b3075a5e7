"""Refits the projections of a pruned student by least squares, in order, before any training.

A projection W of the teacher reads X; that of the student, W_s, is W sliced and reads X_s, what the student itself yields up to
here, refitted. With one linear layer and the tokens of the calibration data it becomes

    W_s + (T - W_s X_s) X_s^T (X_s X_s^T + ridge I)^-1

where T is what it should yield: the kept rows of W X and, where the result is added to the residual stream, what the student's
stream lacks there of the teacher's. The ridge pulls towards the sliced weights, so that where nothing is narrowed nothing
changes. Both graphs run side by side, layer by layer; only the Gram matrices of one stage of one layer are in memory. What
was fitted, and where both graphs are, is kept: a refit that was killed goes on there.

What is refitted: projections with a matrix of their own that read or write a narrowed axis. Left as they are sliced: biases,
stacked experts (their rows are other tokens in the student), and a matrix that is read in several places, as a tied head's is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from minitron.compiler.axes.dims import Dim
from minitron.compiler.axes.narrowing import Indices, Narrowing
from minitron.compiler.axes.table import AxisTable, Contraction
from minitron.compiler.graph.aten import MOVES, op_name
from minitron.compiler.graph.executor import Environment, Executor
from minitron.compiler.graph.names import Fetch
from minitron.compiler.importance.row_blocks import fitted_rows
from minitron.compiler.recovery.refit_progress import Reached, RefitProgress
from minitron.compiler.recovery.refitted_weights import RefittedWeights
from minitron.compiler.roles.residual_stream import LayerEnds
from minitron.compiler.roles.roles import Roles
from minitron.specs.progress import Task

# Share of the mean of the Gram matrix's diagonal that is added to it. From 1e-4 to 1e-1 the excess loss of a refitted student
# moved by 1%.
RIDGE = 1e-2


@dataclass(frozen=True)
class Projection:
    """A matrix of the teacher that is refitted: `read` is the dimension of it that is contracted, `node` where."""

    parameter: str
    node: str
    read: int


@dataclass(frozen=True)
class Stage:
    """Projections that read one value, of one axis at dimension `axis` of it. `stream` is the value that the result of the
    one projection is added to, None where it is not."""

    value: str
    axis: int
    projections: tuple[Projection, ...]
    stream: str | None = None


def find_stages(table: AxisTable, roles: Roles, narrowing: Narrowing, present: Collection[str]) -> list[Stage]:
    """Returns the stages of projections to refit, in the order of the graph. `present`: the parameters that the student
    has."""
    counts: dict[str, int] = {}
    for one in table.contractions:
        if one.weight is not None:
            counts[one.weight] = counts.get(one.weight, 0) + 1
    stages: dict[tuple[str, str | None], Stage] = {}
    for one in table.contractions:
        found = _projection(table, narrowing, one)
        axis = _only(table, one.dim, table.dims(one.value))
        if (
            found is None
            or found.parameter not in present
            or axis is None
            or counts[found.parameter] != 1
            or _embeds(table, found.parameter)
        ):
            continue
        stream = _added_to(table, roles, one.node)
        key = (one.value.name, stream)
        before = stages.get(key, Stage(one.value.name, axis, (), stream))
        stages[key] = Stage(before.value, axis, (*before.projections, found), stream)
    return list(stages.values())


def _projection(table: AxisTable, narrowing: Narrowing, one: Contraction) -> Projection | None:
    if one.weight is None:
        return None
    dims = table.parameters[one.weight]
    if len(dims) != 2 or not any(narrowing.touches(dim) for dim in dims):
        return None
    if any(narrowing.elsewhere(dim) for dim in dims) or op_name(one.node) not in ("linear", "addmm", "matmul", "mm"):
        return None
    read = 1 if op_name(one.node) == "linear" else _only(table, one.dim, dims)
    return None if read is None else Projection(one.weight, one.node.name, read)


def _only(table: AxisTable, dim: Dim, dims: Sequence[Dim]) -> int | None:
    """The one dimension that is this axis."""
    wanted = tuple(table.space.flat(dim))
    places = [i for i, other in enumerate(dims) if tuple(table.space.flat(other)) == wanted]
    return places[0] if len(places) == 1 else None


def _embeds(table: AxisTable, name: str) -> bool:
    """Checks whether rows of the parameter are also looked up as an embedding."""
    return any(
        op_name(user) == "embedding"
        for node in table.nodes
        if node.op == "get_attr" and str(node.target).endswith(name)
        for user in node.users
    )


def _added_to(table: AxisTable, roles: Roles, node: Node) -> str | None:
    """The value of the residual stream that a projection's result is added to, with nothing but moves between."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        (user,) = users
        if op_name(user) in ("add", "add_"):
            break
        if op_name(user) not in MOVES:
            return None
        node = user
    others = [one for one in user.args[:2] if isinstance(one, Node) and one is not node]
    if len(others) != 1 or user.kwargs.get("alpha", 1) != 1 or others[0].op != "call_function":
        return None
    last = table.dims(others[0])[-1:]
    same = bool(last) and tuple(table.space.flat(last[0])) == (roles.hidden.leaf,)
    return others[0].name if same else None


@dataclass(frozen=True)
class Refit:
    """The inputs of a refit: executors over the graphs of teacher and student, and their weights by the teacher's
    names. The student's executor must read `refitted`. `kept` are the kept hidden channels; None where all are. `skipped`
    maps values that only the teacher has, because they come out of dropped layers, to what the student has instead."""

    teacher: Executor
    student: Executor
    weights: Fetch
    refitted: RefittedWeights
    kept: Indices | None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, stages: Sequence[Stage], batches: Sequence[torch.Tensor], task: Task, progress: RefitProgress
    ) -> None:
        """Refits stage by stage, but for those that are known already."""
        theirs, own = self.teacher.start(batches), self.student.start(batches)
        places = {name: i for i in range(self.teacher.segments) for name in self.teacher.names_in(i)}
        todo = [self._todo(stages, number) for number in range(self.student.segments)]
        last = max((number for number, here in enumerate(todo) if here), default=-1)
        done, first, reached = 0, 0, progress.read()
        if reached is not None and not any(todo[: reached.student]):
            done, first = reached.teacher, reached.student
            theirs, own = self.teacher.resume(reached.theirs), self.student.resume(reached.own)
        for number in range(first, last + 1):
            at = max(places[name] for name in self.student.names_in(number) if name in places)
            while done < at:  # layers that the student has lost
                theirs = self.teacher.run_segment(done, theirs)
                done += 1
            for stage in todo[number]:
                self._refit(stage, (done, number), theirs, own)
                task.advance(1)
            if number == last:
                break  # nobody reads what the last one yields
            own = self.student.run_segment(number, own)
            theirs = self.teacher.run_segment(done, theirs)
            done += 1
            progress.save(Reached(done, number + 1, self.teacher.values_of(theirs), self.student.values_of(own)))

    def known(self, stage: Stage) -> bool:
        """Tells whether an earlier process has refitted a stage."""
        return all(one.parameter in self.refitted for one in stage.projections)

    def _todo(self, stages: Sequence[Stage], number: int) -> list[Stage]:
        """The stages inside of a segment of the student that are not known yet."""
        names = set(self.student.names_in(number))
        return [one for one in stages if names.issuperset(p.node for p in one.projections) and not self.known(one)]

    def _refit(
        self,
        stage: Stage,
        segments: tuple[int, int],
        theirs: Sequence[Environment],
        own: Sequence[Environment],
    ) -> None:
        gram = cross = lack = None
        wanted = {one for one in (stage.value, stage.stream) if one is not None}
        ours = {one: self.skipped.get(one, one) for one in wanted}
        for whole, narrow in zip(
            self.teacher.values_in(segments[0], theirs, wanted),
            self.student.values_in(segments[1], own, set(ours.values())),
            strict=True,
        ):
            full, left = _rows(whole[stage.value], stage.axis), _rows(narrow[ours[stage.value]], stage.axis)
            gram, cross = _plus(gram, left.T @ left), _plus(cross, full.T @ left)
            if stage.stream is not None:
                missing = _rows(whole[stage.stream], -1)
                if self.kept is not None:
                    missing = missing[:, torch.from_numpy(self.kept).to(missing.device)]
                lack = _plus(lack, (missing - _rows(narrow[ours[stage.stream]], -1)).T @ left)
        assert gram is not None and cross is not None
        factor = factorised(gram)
        for one in stage.projections:
            if one.parameter in self.refitted:  # of a stage that was killed between two of them
                continue
            kept = self.refitted.recipe(one.parameter).positions[1 - one.read]
            sliced, weight = self.refitted.narrowed(one.parameter), self.weights(one.parameter)
            if one.read == 0:
                sliced, weight = sliced.T, weight.T
            fitted = torch.empty(sliced.shape)
            for rows in fitted_rows(*sliced.shape):
                there = weight[rows] if kept is None else weight.index_select(0, torch.from_numpy(kept[rows]))
                own_rows = sliced[rows].double().cpu()
                left_over = there.double().cpu() @ cross - own_rows @ gram
                if lack is not None:
                    left_over += lack[rows]
                fitted[rows] = (own_rows + solve(factor, left_over)).float()
            self.refitted.store(one.parameter, (fitted if one.read == 1 else fitted.T).contiguous())


def skipped_values(ends: Sequence[LayerEnds], layers: Collection[int]) -> dict[str, str]:
    """Maps what each dropped layer yields to what it was given, where only `layers` stay."""
    found: dict[str, str] = {}
    for layer, end in enumerate(ends):
        if layer not in layers:
            found[end.leave] = found.get(end.entry, end.entry)
    return found


def factorised(gram: torch.Tensor) -> torch.Tensor | None:
    """The Cholesky factor of gram + ridge; None where every value that is read is zero."""
    ridge = RIDGE * float(gram.diagonal().mean())
    if ridge <= 0:
        return None
    regular = gram.clone()
    regular.diagonal().add_(ridge)
    factor: torch.Tensor = torch.linalg.cholesky(regular)
    return factor


def solve(factor: torch.Tensor | None, right_OI: torch.Tensor) -> torch.Tensor:
    """right (gram + ridge)^-1 for the factor of a symmetric gram + ridge [I, I]."""
    return torch.zeros_like(right_OI) if factor is None else torch.cholesky_solve(right_OI.T, factor).T


def _rows(value: torch.Tensor, axis: int) -> torch.Tensor:
    """[tokens, channels] in float32."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis]).float()


def _plus(total: torch.Tensor | None, product: torch.Tensor) -> torch.Tensor:
    product = product.double().cpu()
    return product if total is None else total.add_(product)
