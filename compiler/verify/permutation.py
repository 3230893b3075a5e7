"""The `permutation` check: the teacher with every narrowed axis permuted is the teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import compare, measured
from minitron.compiler.verify.perturbed import perturbed
from minitron.compiler.verify.routes import Routes
from minitron.compiler.weights.recipes import recipes


def permutation(routes: Routes) -> Check:
    """Compares the teacher's graph on permuted weights with the same graph on its own."""
    subject, captured, held = routes.subject, routes.subject.teacher.captured, routes.subject.original.held
    made = recipes(
        captured, subject.teacher.table.parameters, permuted(subject.student.narrowing), range(captured.layer_count)
    )

    def fetch(name: str) -> torch.Tensor:
        return made[name].make(held(name))

    (mixed,) = routes.teacher.captured(fetch)
    detail = "teacher with its narrowed axes permuted against itself"
    check = compare("permutation", mixed, routes.teacher.whole, detail, routes.teacher.floor)
    if check.passed:
        return check
    own = measured(routes.teacher.captured(perturbed(fetch))[0], mixed)  # each of the two rounds by itself
    return compare("permutation", mixed, routes.teacher.whole, detail, routes.teacher.floor.or_more(own))


def permuted(narrowing: Narrowing, seed: int = 0) -> Narrowing:
    """The same leaves, each permuted instead of narrowed."""
    rng = np.random.default_rng(seed)
    kept: dict[Any, Indices] = {
        leaf: rng.permutation(leaf.size.coefficient).astype(np.int64) for leaf in narrowing.kept
    }
    dependent = {
        leaf: Dependent(
            one.parents,
            [rng.permutation(leaf.size.coefficient).astype(np.int64) for _ in one.lists],
            leaf.size.coefficient,
        )
        for leaf, one in narrowing.dependent.items()
    }
    return Narrowing(narrowing.space, kept, dependent)
