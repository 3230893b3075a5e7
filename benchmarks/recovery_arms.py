"""The arms of benchmarks/recovery.py: values of the spec, and what is done beside the compiler for published methods.

    channels               Minitron (arXiv 2407.14679): channels, neurons and heads by their activations, distilled
    weight norms           what stays is chosen by the L2 norm of all weights that go with it, as Torch-Pruning does (GroupNorm
                           importance, arXiv 2301.12900), distilled
    random init            the student's shape with fresh weights, distilled
    cross-entropy          channels, trained on the text alone, without the teacher
    rotated, no KD         the principal basis (SliceGPT, arXiv 2401.15024), trained on the text alone
All others are values of the spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minitron.compiler.axes.dims import Dim
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.compilation import Compilation
from minitron.compiler.importance.scores import Scores, ScoreTable

REFIT: dict[str, Any] = {"recovery.refit": "least_squares"}
PRINCIPAL: dict[str, Any] = {"importance.hidden_basis": "principal"}
GREEDY: dict[str, Any] = {"importance.selection": "greedy"}
MERGED: dict[str, Any] = {"recovery.merge_experts": True}
UNTIED: dict[str, Any] = {"importance.untie": True}
ALIGNED: dict[str, Any] = {"distill.loss.hidden_states": {"coordinates": "kept"}}
WEAKLY: dict[str, Any] = {"distill.loss.hidden_states": {"coordinates": "kept", "weight": 0.3}}
MUON: dict[str, Any] = {"distill.optimizer.name": "muon"}


@dataclass(frozen=True)
class Arm:
    """Values of the spec, and what is done beside the compiler.

    weight_norms   scores are the norms of weights
    fresh          the student's weights are drawn at random
    cross_entropy  the training has the text's own next tokens in the teacher's place
    blocks         the share of the tokens that block-local distillation is given (`block_local`)
    aligned        hidden states are aligned after it, too
    trained        the arm differs from another one in its training only: nothing is measured before it
    """

    values: dict[str, Any] = field(default_factory=dict)
    weight_norms: bool = False
    fresh: bool = False
    cross_entropy: bool = False
    blocks: float = 0.0
    aligned: bool = False
    trained: bool = False


ARMS: dict[str, Arm] = {
    "channels": Arm(),
    "weight norms": Arm(weight_norms=True),
    "channels + refit": Arm(REFIT),
    "greedy + refit": Arm({**REFIT, **GREEDY}),
    "principal": Arm(PRINCIPAL),
    "principal, untied": Arm({**PRINCIPAL, **UNTIED}),
    "principal + refit": Arm({**PRINCIPAL, **REFIT}),
    "principal + greedy + refit": Arm({**PRINCIPAL, **REFIT, **GREEDY}),
    "experts merged": Arm(MERGED),
    "experts greedy": Arm(GREEDY),
    "experts greedy, merged": Arm({**GREEDY, **MERGED}),
    "channels + aligned": Arm(ALIGNED, trained=True),
    "principal + aligned": Arm({**PRINCIPAL, **ALIGNED}, trained=True),
    "principal + aligned 0.3": Arm({**PRINCIPAL, **WEAKLY}, trained=True),
    "channels + projected": Arm({"distill.loss.hidden_states": {}}, trained=True),
    "all": Arm({**PRINCIPAL, **REFIT, **GREEDY, **ALIGNED}, trained=True),
    "all, aligned 0.3": Arm({**PRINCIPAL, **REFIT, **GREEDY, **WEAKLY}, trained=True),
    "channels + muon": Arm(MUON, trained=True),
    "all + muon": Arm({**PRINCIPAL, **REFIT, **GREEDY, **ALIGNED, **MUON}, trained=True),
    "all, untied + muon": Arm({**PRINCIPAL, **REFIT, **GREEDY, **ALIGNED, **UNTIED, **MUON}, trained=True),
    "all, untied": Arm({**PRINCIPAL, **REFIT, **GREEDY, **ALIGNED, **UNTIED}, trained=True),
    "principal, blocks 25%": Arm({**PRINCIPAL, **ALIGNED}, blocks=0.25, trained=True),
    "principal + aligned, blocks 25%": Arm({**PRINCIPAL, **ALIGNED}, blocks=0.25, aligned=True, trained=True),
    "all, blocks 25%": Arm({**PRINCIPAL, **REFIT, **GREEDY, **ALIGNED}, blocks=0.25, aligned=True, trained=True),
    "random init": Arm(fresh=True, trained=True),
    "cross-entropy": Arm(cross_entropy=True, trained=True),
    "rotated, no KD": Arm(PRINCIPAL, cross_entropy=True, trained=True),
}


def weight_norms(compilation: Compilation) -> tuple[ScoreTable, torch.Tensor | None]:
    """The scores of channels, heads and neurons: the sum of squares of all weights that would go with each."""
    roles = compilation.plan.teacher.roles
    heads = {}
    for layer, site in roles.heads.items():
        leaves = tuple(leaf for leaf in (site.group, site.repeat) if leaf is not None)
        heads[layer] = _norms(compilation, leaves).reshape(site.groups, site.repeats)
    widths = {
        name: {layer: _norms(compilation, (width.leaf,)) for layer, width in layers.items()}
        for name, layers in roles.widths.items()
    }
    return ScoreTable(_norms(compilation, (roles.hidden.leaf,)), heads, widths), None


def _norms(compilation: Compilation, leaves: Dim) -> Scores:
    """For each index of the product of some leaves the sum of squares of the weights at that index."""
    table = compilation.plan.teacher.table
    sizes = [leaf.size.coefficient for leaf in leaves]
    total = np.zeros(sizes, dtype=np.float64)
    for name, dims in table.parameters.items():
        for axis, dim in enumerate(dims):
            if not set(leaves) <= set(table.space.leaves(dim)):
                continue
            weight = compilation.source.get(name).double().movedim(axis, 0)
            squares = weight.square().reshape(weight.shape[0], -1).sum(1)
            for place in np.ndindex(*sizes):
                one = {leaf: np.array([index]) for leaf, index in zip(leaves, place, strict=True)}
                total[place] += float(squares[torch.from_numpy(Narrowing(table.space, one).positions(dim))].sum())
    return total.reshape(-1).astype(np.float32)


def overrides(arm: Arm) -> Iterator[str]:
    """The arm's values as `--set` takes them."""
    import json

    for path, value in arm.values.items():
        yield f"{path}={json.dumps(value)}"
