"""The `permutation` check: the teacher with every narrowed axis permuted is the teacher."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import compare
from minitron.compiler.verify.routes import Routes
from minitron.compiler.weights.recipes import recipes


def permutation(routes: Routes) -> Check:
    """Compares the teacher's graph on permuted weights with the same graph on its own."""
    subject, captured, held = routes.subject, routes.subject.teacher.captured, routes.subject.original.held
    made = recipes(
        captured, subject.teacher.table.parameters, permuted(subject.student.narrowing), range(captured.layer_count)
    )
    (mixed,) = routes.teacher.captured(lambda name: made[name].make(held(name)))
    detail = "teacher with its narrowed axes permuted against itself"
    return compare("permutation", mixed, routes.teacher.whole, detail, routes.teacher.floor)


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
