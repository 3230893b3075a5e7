"""The weights of single experts: which parameters hold a slice for each expert of a layer, and where the neurons stand in it.

A slice is what an expert computes with: matrices and biases of its channels, and what is added to the residual stream for each
expert. What the router has for each expert, a row of its matrix or a number beside it, is not the expert's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minitron.compiler.axes.dims import Atom, Dim, Space, size_of
from minitron.compiler.axes.narrowing import Indices, Narrowing
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.roles.roles import Roles
from minitron.specs.errors import UsageError


@dataclass(frozen=True)
class ExpertWeights:
    """The parameters of a layer's experts.

    count      the number of experts
    channels   the leaf of an expert's own channels, its neurons
    axes       parameter -> the dimension of it that is the experts'
    """

    count: int
    channels: Atom
    axes: dict[str, int]


def find_expert_weights(table: AxisTable, roles: Roles, layer: int) -> ExpertWeights:
    """Returns the parameters of one layer's experts. Raises UsageError, with the place, where experts do not have slices of
    their own, or their neurons cannot be put into another order one expert at a time."""
    mixture, space = roles.mixtures[layer], table.space
    own = [one[layer] for one in roles.widths.values() if layer in one and one[layer].parents == mixture.experts]
    if len(own) != 1:
        raise UsageError(
            f"layer {layer}: the graph does not show that the channels of each expert are its own, so they cannot be put into "
            "the order of another expert's"
        )
    (width,) = own
    atoms, contracted = set(mixture.experts), {one.weight for one in table.contractions}
    axes: dict[str, int] = {}
    for name, dims in table.parameters.items():
        of_expert = [axis for axis, dim in enumerate(dims) if atoms & set(space.leaves(dim))]
        inside = any(width.leaf in space.leaves(dim) for dim in dims)
        added = name not in contracted and any(tuple(space.flat(dim)) == (roles.hidden.leaf,) for dim in dims)
        if not of_expert or not (inside or added):
            continue
        if len(of_expert) != 1 or space.flat(dims[of_expert[0]]) != mixture.experts:
            raise UsageError(f"{name}: an expert has no slice of its own in it")
        axes[name] = of_expert[0]
    return ExpertWeights(size_of(mixture.experts).coefficient, width.leaf, axes)


def neurons_of(space: Space, channels: Atom, dim: Dim) -> Indices:
    """The neuron that each index of a dimension belongs to; -1 where it belongs to none.

    A gate and an up projection in one, [gate, up] or interleaved, have two indices of each neuron.
    """
    size, count = channels.size.coefficient, Narrowing(space).count(dim)
    found = np.zeros(count, dtype=np.int64)
    for bit in range(max(1, (size - 1).bit_length())):
        chosen = np.flatnonzero(np.arange(size) >> bit & 1)
        found[Narrowing(space, {channels: chosen}).positions(dim)] |= 1 << bit
    found[Narrowing(space, {channels: np.zeros(0, dtype=np.int64)}).positions(dim)] = -1
    return found


def reordered(space: Space, channels: Atom, dim: Dim, order: Indices) -> Indices:
    """The indices of a dimension whose neurons stand in another `order`: new neuron i is what neuron order[i] was."""
    return Narrowing(space, {channels: order}).positions(dim)
