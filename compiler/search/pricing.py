"""The costs of any number of shapes at once, from the dimensions of the teacher's parameters: no model is built.

The size of a parameter is a polynomial in the widths: that of `q_proj`, hidden_size x groups x repeats x the width of a head.
Layers that are alike share one, and counting which of them are kept gives the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minitron.compiler.axes.dims import Atom, Dim
from minitron.compiler.estimate import model_costs as costs
from minitron.compiler.estimate.kv_cache import CacheLayer, cache_layers
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.compiler.search.grid import Numbers, Shapes

Monomial = tuple[str, ...]
Polynomial = dict[Monomial, int]
REPEATS = "repeats"


@dataclass(frozen=True)
class Prices:
    """The costs of shapes, an array for each figure; `pairs` are the FLOPs of attention for each earlier position."""

    parameters: Numbers
    active_parameters: Numbers
    weight_bytes: Numbers
    kv_cache_bytes_per_token: Numbers
    flops_per_token: Numbers
    pairs: Numbers


def times(one: Polynomial, other: Polynomial) -> Polynomial:
    """The product of two polynomials."""
    found: Polynomial = {}
    for a, x in one.items():
        for b, y in other.items():
            key = tuple(sorted(a + b))
            found[key] = found.get(key, 0) + x * y
    return found


def plus(one: Polynomial, other: Polynomial) -> Polynomial:
    """The sum of two polynomials."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in one.keys() | other.keys()}


def evaluate(polynomial: Polynomial, variables: Shapes) -> Numbers:
    """The values of a polynomial, exact in 64 bits."""
    count = len(next(iter(variables.values())))
    total = np.zeros(count, np.int64)
    for monomial, factor in polynomial.items():
        product = np.full(count, factor, np.int64)
        for name in monomial:
            product *= variables[name]
        total += product
    return total


@dataclass(frozen=True)
class Pricing:
    """Prices shapes of one teacher. `kept` are the layers that stay where the spec names them, else the first ones do, as in
    the plan."""

    teacher: AnalysedTeacher
    bytes_per_weight: int
    kept: tuple[int, ...] | None = None

    def prices(self, shapes: Shapes) -> Prices:
        """Returns the costs of shapes that say the width of every axis."""
        variables = self._variables(shapes)
        counts = shapes[LAYERS]
        parameters = self._total(self._sizes, variables, counts)
        active = self._total(self._active, variables, counts)
        ends = self._ends
        looked_up = np.zeros_like(parameters)
        if ends[0] != ends[1]:
            looked_up = evaluate(self._of_parameter(ends[0]), variables)
        return Prices(
            parameters,
            active,
            parameters * self.bytes_per_weight,
            self._total(self._cached, variables, counts) * self.bytes_per_weight,
            2 * (active - looked_up),
            self._total(self._pairs, variables, counts),
        )

    # -- polynomials of layers; None is what stands outside of them -------------------------------------------------------

    @cached_property
    def _sizes(self) -> Mapping[int | None, Polynomial]:
        return self._sum((name, self._of_parameter(name)) for name in self._parameters)

    @cached_property
    def _active(self) -> Mapping[int | None, Polynomial]:
        """The sizes with as many of a stack's experts as a token is sent to."""
        captured, table, roles = self.teacher.captured, self.teacher.table, self.teacher.roles
        stacked, chosen = costs.stacked_parameters(captured, table, roles), costs.chosen_experts(roles)

        def met(name: str) -> Polynomial:
            if name not in stacked or chosen is None:
                return self._of_parameter(name)
            found: Polynomial = {(): chosen}
            for dim in table.parameters[name][1:]:
                found = times(found, self._of_dim(dim))
            return found

        return self._sum((name, met(name)) for name in self._parameters)

    @cached_property
    def _attention(self) -> Mapping[int, costs.HeadCounts]:
        return costs.attention_counts(self.teacher.captured, self.teacher.roles, self.teacher.table)

    @cached_property
    def _pairs(self) -> Mapping[int | None, Polynomial]:
        return {
            layer: {(GROUPS, REPEATS): 2 * (one.key_width + one.value_width)} for layer, one in self._attention.items()
        }

    @cached_property
    def _cached(self) -> Mapping[int | None, Polynomial]:
        """Elements of a token: keys and values of every group, or as many as the model's own cache holds of something else."""
        captured = self.teacher.captured
        layers = cache_layers(captured.config, captured.attention)
        found: dict[int | None, Polynomial] = {}
        for (layer, one), held in zip(self._attention.items(), self._held(layers), strict=True):
            width = one.key_width + one.value_width
            by_group = held is None or held.elements == one.groups * width
            found[layer] = {(GROUPS,): width} if by_group or held is None else {(): held.elements}
        return found

    def _held(self, layers: Iterable[CacheLayer] | None) -> list[CacheLayer | None]:
        known = list(layers or ())
        return list(known) if len(known) == len(self._attention) else [None] * len(self._attention)

    def _sum(self, terms: Iterable[tuple[str, Polynomial]]) -> dict[int | None, Polynomial]:
        found: dict[int | None, Polynomial] = {}
        for name, polynomial in terms:
            layer = self.teacher.captured.layer_in_path(name)
            found[layer] = plus(found.get(layer, {}), polynomial)
        return found

    def _total(self, of_layers: Mapping[int | None, Polynomial], variables: Shapes, counts: Numbers) -> Numbers:
        """The sum over the kept layers and what stands outside: each different polynomial is evaluated once."""
        total = evaluate(of_layers.get(None, {}), variables)
        kinds: dict[tuple[tuple[Monomial, int], ...], list[int]] = {}
        for layer, polynomial in of_layers.items():
            if layer is not None:
                kinds.setdefault(tuple(sorted(polynomial.items())), []).append(layer)
        for kind, layers in kinds.items():
            if self.kept is not None:
                number = np.int64(len(set(layers) & set(self.kept)))
                total += number * evaluate(dict(kind), variables)
            else:
                until = np.zeros(self.teacher.captured.layer_count + 1, np.int64)
                until[1:] = np.cumsum(np.isin(np.arange(self.teacher.captured.layer_count), layers))
                total += until[counts] * evaluate(dict(kind), variables)
        return total

    # -- polynomials of parameters -----------------------------------------------------------------------------------------

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.teacher.captured.model.named_parameters())

    @cached_property
    def _ends(self) -> tuple[str, str]:
        """The parameters that token ids index and that yields the logits."""
        return costs.embedding_name(self.teacher.captured), self.teacher.head.weight

    def _of_parameter(self, name: str) -> Polynomial:
        found: Polynomial = {(): 1}
        for dim in self.teacher.table.parameters[name]:
            found = times(found, self._of_dim(dim))
        return found

    def _of_dim(self, dim: Dim) -> Polynomial:
        found: Polynomial = {(): 1}
        for atom in self.teacher.table.space.flat(dim):
            if atom in self._leaves:
                factor: Polynomial = {(self._leaves[atom],): 1}
            elif atom.parts is not None:
                factor = {}
                for part in atom.parts:
                    factor = plus(factor, self._of_dim(part))
            else:
                factor = {(): atom.size.coefficient}
            found = times(found, factor)
        return found

    @cached_property
    def _leaves(self) -> Mapping[Atom, str]:
        """Leaf -> the variable that says its width."""
        roles = self.teacher.roles
        found = {roles.hidden.leaf: HIDDEN}
        for name, layers in roles.widths.items():
            found |= {width.leaf: f"{name}/{width.together}" for width in layers.values()}
        for site in roles.heads.values():
            found |= {site.group: GROUPS} if site.group is not None else {}
            found |= {site.repeat: REPEATS} if site.repeat is not None else {}
        return found

    def _variables(self, shapes: Shapes) -> dict[str, Numbers]:
        found = dict(shapes)
        if HEADS in shapes:
            found[REPEATS] = shapes[HEADS] // shapes[GROUPS]
        for name, layers in self.teacher.roles.widths.items():
            for width in layers.values():
                found[f"{name}/{width.together}"] = shapes[name] // width.together
        return found
