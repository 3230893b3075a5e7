"""What the analysis leaves free has no order: permuting it leaves every family's logits as they were. What it pins has one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler import Plan
from minitron.compiler.axes.dims import Atom
from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN
from minitron.compiler.weights.recipes import recipes
from tests.foundry import Foundry, logits, teacher_model, token_ids
from tests.models import FAMILIES

NAMED = (HIDDEN, "intermediate_size", HEADS, GROUPS)


def whole(foundry: Foundry, family: str) -> Plan:
    return foundry.whole(family, num_hidden_layers=2)


def leaves_of_parameters(plan: Plan) -> set[Atom]:
    """Everything that parameters are made of, but for the vocabulary: its order is the tokenizer's."""
    space = plan.teacher.table.space
    result = next(node for node in plan.teacher.captured.graph.nodes if node.op == "output").args[0]
    while isinstance(result, tuple | list):
        (result,) = result
    vocabulary = set(space.leaves(plan.teacher.table.nodes[result][-1]))
    every = {leaf for dims in plan.teacher.table.parameters.values() for dim in dims for leaf in space.leaves(dim)}
    return {leaf for leaf in every - vocabulary if leaf.size.coefficient > 1}


def named(plan: Plan) -> set[Atom]:
    """The leaves of all axes that a spec may name and these families have."""
    heads = [
        atom for site in plan.teacher.roles.heads.values() for atom in (site.group, site.repeat) if atom is not None
    ]
    widths = [width.leaf for width in plan.teacher.roles.widths["intermediate_size"].values()]
    return {plan.teacher.roles.hidden.leaf, *heads, *widths}


def turned(plan: Plan, leaves: Collection[Atom]) -> Narrowing:
    """Each of these leaves in another order; query heads in another order in each key-value group."""
    rng = np.random.default_rng(0)
    parents = {site.repeat: site.group for site in plan.teacher.roles.heads.values() if site.repeat and site.group}
    kept: dict[Atom, Indices] = {}
    dependent: dict[Atom, Dependent] = {}
    for leaf in sorted(leaves, key=lambda one: one.number):
        count = leaf.size.coefficient
        if leaf in parents:
            first = another_order(rng, count)
            lists = [first, *(rng.permutation(count) for _ in range(parents[leaf].size.coefficient - 1))]
            dependent[leaf] = Dependent((parents[leaf],), lists, count)
        else:
            kept[leaf] = another_order(rng, count)
    return Narrowing(plan.teacher.table.space, kept, dependent)


def another_order(rng: np.random.Generator, count: int) -> Indices:
    order = np.arange(count, dtype=np.int64)
    while np.array_equal(order, np.arange(count)):
        order = rng.permutation(count)
    return order


class Teacher:
    """The Hugging Face teacher, whose parameters can be put into another order."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model: Any = teacher_model(plan)
        self.weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.ids = token_ids(2, 40)
        self.whole = logits(self.model, self.ids)

    def error(self, leaves: Collection[Atom]) -> tuple[float, int]:
        """How far the logits move over the largest of them, and how many parameters were changed."""
        made = recipes(
            self.plan.teacher.captured,
            self.plan.teacher.table.parameters,
            turned(self.plan, leaves),
            range(self.plan.teacher.captured.layer_count),
        )
        changed = 0
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(made[name].make(self.weights[name]))
                changed += not torch.equal(parameter, self.weights[name])
        difference = logits(self.model, self.ids) - self.whole
        return float(difference.abs().max() / self.whole.abs().max()), changed


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_free_has_no_order(foundry: Foundry, family: str) -> None:
    """Hidden channels, neurons, key-value groups, query heads and whatever else is free: one by one, and all at once."""
    plan = whole(foundry, family)
    free = {leaf for leaf in leaves_of_parameters(plan) if not leaf.pins}
    assert named(plan) <= free
    teacher = Teacher(plan)
    for leaf in sorted(free, key=lambda one: one.number):
        error, changed = teacher.error({leaf})
        assert changed > 0 and error < 1e-5, f"{leaf} has an order"
    error, changed = teacher.error(free)
    space, parameters = plan.teacher.table.space, plan.teacher.table.parameters.values()
    assert changed == sum(any(free & set(space.leaves(dim)) for dim in dims) for dims in parameters)
    assert error < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_pinned_has_an_order(foundry: Foundry, family: str) -> None:
    """The other half of it: nothing is refused for nothing."""
    plan = whole(foundry, family)
    pinned = {leaf for leaf in leaves_of_parameters(plan) if leaf.pins}
    assert pinned, "rotary positions, in each of these families"
    teacher = Teacher(plan)
    for leaf in pinned:
        error, changed = teacher.error({leaf})
        assert changed > 0 and error > 1e-3, f"{leaf} could be permuted"
