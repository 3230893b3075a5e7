"""Mixtures of experts as the graph shows them: which axis is that of the experts, and how a router picks among them.

Everything is read off around the product that takes the experts' channels back into the residual stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from minitron.compiler.axes.dims import Atom, Dim, Dims
from minitron.compiler.axes.index_meaning import Offsets
from minitron.compiler.axes.table import AxisTable, Contraction
from minitron.compiler.graph.aten import argument, axis_index, op_name


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    experts        the axis of the experts: one leaf, or (group, expert within it) where the router picks groups first
    picked         how many experts a token is sent to
    groups         how many groups of experts there are, of which `picked_groups` are open to a token
    ranked         how many experts are needed to rank a group
    ends           where rows are sorted by expert: the node that says where the rows of each end
    told_apart     the rows of each expert are known: by `ends`, or since the experts have a dimension of their own
    contribution   the node of what each expert adds to the residual stream, weighted by the router as far as it is by then
    """

    experts: Dim
    picked: int
    groups: int
    picked_groups: int
    ranked: int
    ends: Node | None
    told_apart: bool
    contribution: Node

    @property
    def least(self) -> int:
        """The fewest experts that the router can work with."""
        in_group = max(self.ranked, -(-self.picked // self.picked_groups))
        return max(self.picked, self.groups * in_group)


def is_stack(dims: Dims) -> bool:
    """Checks whether a parameter is a matrix for each of several experts, and not the filters of channels, [C, 1,
    K]."""
    return len(dims) == 3 and all(dims)


def find_mixture(table: AxisTable, down: Contraction, experts: Dim, length: int | None) -> Mixture:
    """`down` contracts the experts' channels, `experts` is the stacked dimension of its weight.

    `length` is the number of tokens where the graph is of one number: then the row count is that number times the rows
    of one token.
    """
    flat = table.space.flat(experts)
    picks: dict[Dim, int] = {}
    for node in _rankings(table, flat):
        dims = table.dims(node.args[0])  # type: ignore[arg-type]
        axis = axis_index(argument(node, "dim", -1), len(dims))
        ranked = table.space.flat(dims[axis])
        count = argument(node, "k")
        picks[ranked] = max(picks.get(ranked, 1), count if isinstance(count, int) else 1)
    rows = [
        one.rows.size.coefficient // (length or 1) for one in table.sorted if set(table.space.flat(one.by)) == set(flat)
    ]
    ends = next((n for n in down.node.all_input_nodes if isinstance(table.meanings.get(n), Offsets)), None)
    grouped = len(flat) == 2
    contribution = _weighted(table, down.node)
    own = [dim for dim in table.dims(contribution) if table.space.flat(dim) == flat]
    return Mixture(
        flat,
        picked=max(rows, default=picks.get(flat, 1)),
        groups=flat[0].size.coefficient if grouped else 1,
        picked_groups=picks.get(flat[:1], flat[0].size.coefficient) if grouped else 1,
        ranked=picks.get(flat[1:] if grouped else flat, 1),
        ends=ends,
        told_apart=ends is not None or len(own) == 1,
        contribution=contribution,
    )


def _rankings(table: AxisTable, experts: Dim) -> Iterator[Node]:
    """The operators that pick among experts, or among groups of them."""
    for node in table.nodes:
        if op_name(node) == "topk":
            dims = table.dims(node.args[0])  # type: ignore[arg-type]
            if any(atom in experts for dim in dims for atom in table.space.flat(dim)):
                yield node


def _weighted(table: AxisTable, product: Node) -> Node:
    """Returns the node of an expert's contribution: its product, after the biases and router weights applied row by
    row."""
    axes = [table.space.flat(dim) for dim in table.dims(product)]
    node = product
    while len(node.users) == 1:
        user = next(iter(node.users))
        name = op_name(user)
        if name not in ("mul", "mul_", "add", "add_", "to", "_to_copy"):
            break
        if [table.space.flat(dim) for dim in table.dims(user)] != axes:
            break
        node = user
    return node


def prunable_per_owner(table: AxisTable, leaf: Atom, owners: Dim) -> bool:
    """Checks whether the kept indices of `leaf` may differ with the index of `owners`: the channels of each expert,
    say.

    That is so where no value ever holds those of two owners at once: every value and weight that has the leaf also has
    the owners, or rows that are sorted by them, once, and of a weight they stand in one dimension; and where the leaf
    is contracted with weights only.
    """
    space = table.space
    atoms = set(owners)
    rows = {space.find(one.rows) for one in table.sorted if set(space.flat(one.by)) == atoms}

    def owned(dims: Dims, *, together: bool) -> bool:
        if not any(leaf in space.leaves(dim) for dim in dims):
            return True
        for ways in itertools.product(*(space.ways(dim) for dim in dims)):
            if not any(leaf in way for way in ways):
                continue
            sorted_rows = sum(bool(rows & way) for way in ways)
            times = [sum(atom in way for way in ways) for atom in atoms]
            whole = not together or any(atoms <= way for way in ways)
            if sorted_rows + max(times) != 1 or not (sorted_rows or (min(times) == 1 and whole)):
                return False
        return True

    results = [one for node in table.nodes for one in table.results(node)]
    contracted = (c for c in table.contractions if leaf in space.leaves(c.dim))
    return (
        all(c.weight is not None for c in contracted)
        and all(owned(dims, together=True) for dims in table.parameters.values())
        and all(owned(dims, together=False) for dims in results)
    )
