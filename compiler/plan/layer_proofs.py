"""Students of one plan that keep other layers: which can be, each proved once.

The plan proves one choice of layers, and scores choose later. Where layers differ in kind, or a constant follows a layer's
number, not every choice can be a student; the plan says so, and a compile takes the highest-scored choice that can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from minitron.compiler.importance.layer_order import choices
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.plan.prove import Proof, buildable, kinds_of_layers, prove, proved
from minitron.compiler.rewrite.scale_repair import EQUAL, constants_of_layers
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.student.targets import Targets
from minitron.specs.errors import UsageError

Layers = tuple[int, ...]
Proven = tuple[Any, torch.nn.Module]  # the student's configuration, and its model on the meta device

MOST_SAMPLED = 8
"""Choices with layers of other kinds, or kinds in another order, that a plan tries."""


class LayerProofs:
    """The proofs of students that have the widths of `targets`, by the layers that they keep; `known` are made already."""

    def __init__(self, teacher: AnalysedTeacher, targets: Targets, known: Mapping[Layers, Proven]) -> None:
        self._teacher, self._targets = teacher, targets
        self._found: dict[Layers, Proven | UsageError] = dict(known)

    def proof(self, layers: Layers) -> Proven:
        """The configuration and the model of the student that keeps `layers`. Raises UsageError where such a student
        cannot be."""
        if layers not in self._found:
            self._found[layers] = self._prove(layers)
        found = self._found[layers]
        if isinstance(found, UsageError):
            raise found
        return found

    def refusal(self, layers: Layers) -> UsageError | None:
        """The reason why `layers` cannot be kept; None where they can."""
        try:
            self.proof(layers)
        except UsageError as error:
            return error
        return None

    def possible(self, layers: Layers) -> bool:
        """Checks whether `layers` can be kept."""
        return self.refusal(layers) is None

    def highest(self, scores: ScoreTable, *, contiguous: bool) -> Layers | None:
        """The highest-scored layers that can be kept; None where none of the choices that are tried can."""
        assert scores.layers is not None
        order = choices(scores.layers, self._targets.layers, contiguous=contiguous)
        return next((one for one in order if self.possible(one)), None)

    def limits(self, *, contiguous: bool) -> Iterator[str]:
        """Yields sentences on choices of layers that scores might make and that cannot be kept."""
        if not self._targets.rank_layers(self._teacher.captured.layer_count):
            return
        for layers in sampled(self._teacher, self._targets.layers, self._kinds, contiguous=contiguous):
            if (error := self._not_buildable(layers)) is not None:
                yield (
                    f"not any layers can be kept: {', '.join(map(str, layers))} cannot ({error}); scores choose among those "
                    "that can"
                )
                break
        for place, numbers in enumerate(self._constants):
            moved = [
                layer
                for layer in range(place + 1, len(self._constants))
                if self._kinds[layer] == self._kinds[place] and not _equal(self._constants[layer], numbers)
            ]
            if moved:
                yield (
                    f"a constant in layer {moved[0]} is another than in layer {place}, which is of the same kind: it follows "
                    "the layer's number, so scores choose only among layers that keep such numbers, as the first ones do"
                )
                break

    @cached_property
    def _kinds(self) -> list[str]:
        return kinds_of_layers(self._teacher.captured)

    @cached_property
    def _constants(self) -> list[dict[str, list[float]]]:
        return constants_of_layers(self._teacher.captured)

    @cached_property
    def _built(self) -> dict[tuple[str, ...], UsageError | None]:
        """The kinds of layers, in order, of which a student was built or could not be."""
        proven = [layers for layers, found in self._found.items() if not isinstance(found, UsageError)]
        return {tuple(self._kinds[layer] for layer in layers): None for layers in proven}

    def _prove(self, layers: Layers) -> Proven | UsageError:
        found = self._moved_constant(layers) or self._not_buildable(layers)
        if found is not None:
            return found
        try:
            return prove(self._teacher, self._targets, layers)
        except UsageError as error:
            return error

    def _not_buildable(self, layers: Layers) -> UsageError | None:
        """The error of building a student with layers of these kinds, in this order; it is tried once."""
        kinds = tuple(self._kinds[layer] for layer in layers)
        if kinds not in self._built:
            try:
                buildable(self._teacher, self._targets, layers)
                self._built[kinds] = None
            except UsageError as error:
                self._built[kinds] = error
        return self._built[kinds]

    def _moved_constant(self, layers: Layers) -> UsageError | None:
        """The error where a layer would take the place of one of its kind that has other constants: the teacher itself
        shows what numbers its code gives that place."""
        for place, layer in enumerate(layers):
            if self._kinds[layer] == self._kinds[place] and not _equal(self._constants[layer], self._constants[place]):
                return UsageError(
                    f"layer {layer} would be number {place}, and its code multiplies or adds a constant that follows the number"
                )
        return None


def first_provable(
    teacher: AnalysedTeacher, targets: Targets, layers: Layers, proof: Proof | None = None, *, contiguous: bool
) -> tuple[Layers, Targets, Any, torch.nn.Module]:
    """Returns `layers` and their student, or, where scores will choose and these cannot be kept, the first others that can.
    Raises UsageError with what is wrong with `layers` where none can."""
    try:
        return layers, *proved(teacher, targets, layers, proof)
    except UsageError as error:
        first = error
    captured = teacher.captured
    if targets.rank_layers(captured.layer_count):
        last = tuple(range(captured.layer_count - targets.layers, captured.layer_count))
        others = sampled(teacher, targets.layers, kinds_of_layers(captured), contiguous=contiguous)
        for one in dict.fromkeys((last, *others)):
            if one == layers:
                continue
            try:
                return one, *proved(teacher, targets, one, proof)
            except UsageError:
                continue
    raise first


def sampled(teacher: AnalysedTeacher, keep: int, kinds: Sequence[str], *, contiguous: bool) -> list[Layers]:
    """A few choices of `keep` layers, the first ones before others; no two have the same kinds in the same order."""
    count = teacher.captured.layer_count
    if contiguous:
        every = [[*range(start), *range(start + count - keep, count)] for start in range(keep, -1, -1)]
    else:
        every = [list(range(keep)), list(range(count - keep, count))]
        for kind in dict.fromkeys(kinds):
            of_kind = [layer for layer in range(count) if kinds[layer] == kind]
            others = [layer for layer in range(count) if kinds[layer] != kind]
            every += [(of_kind + others)[:keep], (others + of_kind)[:keep]]
    found: dict[tuple[str, ...], Layers] = {}
    for layers in map(sorted, every):
        found.setdefault(tuple(kinds[layer] for layer in layers), tuple(layers))
    return list(found.values())[:MOST_SAMPLED]


def _equal(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> bool:
    """Compares the constants of two layers; where their operators differ they are not comparable, and taken as equal."""
    if a.keys() != b.keys() or any(len(a[key]) != len(b[key]) for key in a):
        return True
    pairs = [pair for key in a for pair in zip(a[key], b[key], strict=True)]
    return all(abs(x - y) <= EQUAL * max(abs(x), abs(y)) for x, y in pairs)
