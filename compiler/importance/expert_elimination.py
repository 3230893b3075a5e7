"""Backward elimination of experts: which ones can go so that what a mixture adds to the residual stream changes least.

A token x gets the sum of g_e(x) f_e(x) over the experts that it is sent to, g the router's weights. Without the experts S it
lacks those of S, and the squared error over all tokens is the sum of G over S x S, where

    G_ef = sum over tokens of  <g_e(x) f_e(x), g_f(x) f_f(x)>

is the Gram matrix [experts, experts] of what experts add. So the next to go is the one with the least G_ee + 2 sum of G_es
over those that are gone: little is added by it, or what it adds cancels what they have added. The order is nested: it serves
every number of experts. Assumed: nothing takes the place of what is gone. A router picks others instead, and may make their
weights sum to one; the calibration data does not show what these yield for tokens that they were not sent.

Where a router picks among groups of experts first, each round takes one expert of every group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minitron.compiler.importance.scores import Scores

# Tokens whose rows are copied at a time: 67 MB for eight experts of 2048 channels.
TOKENS_AT_ONCE = 1024


@dataclass
class ExpertGram:
    """The Gram matrix [experts, experts] of what the experts of one layer add, in float64."""

    experts: int
    total: torch.Tensor | None = None

    def add_dense(self, added_ENH: torch.Tensor) -> None:
        """Takes in what every expert adds to every token, zero where a token was not sent to it."""
        flat = added_ENH.flatten(1)
        self._add((flat @ flat.T).double())

    def add_rows(self, rows_NH: torch.Tensor, ends_E: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """Takes in rows that stand expert by expert, up to `ends`; `tokens` numbers the token of each. Every token has the
        same number of rows."""
        picked = rows_NH.shape[0] // max(1, int(torch.unique(tokens_N).numel()))
        places_TK = torch.argsort(tokens_N, stable=True).reshape(-1, picked)
        assert bool((tokens_N[places_TK] == tokens_N[places_TK[:, :1]]).all()), "tokens have unequal numbers of rows"
        found = rows_NH.new_zeros(self.experts**2, dtype=torch.float64)
        for part_TK in torch.split(places_TK, TOKENS_AT_ONCE):
            expert_TK = torch.searchsorted(ends_E.to(part_TK.dtype), part_TK, right=True)
            added_TKH = rows_NH[part_TK]
            products_TKK = (added_TKH @ added_TKH.mT).double()
            pairs_TKK = expert_TK[:, :, None] * self.experts + expert_TK[:, None, :]
            found.index_add_(0, pairs_TKK.flatten(), products_TKK.flatten())
        self._add(found.reshape(self.experts, self.experts))

    def _add(self, more_EE: torch.Tensor) -> None:
        self.total = more_EE if self.total is None else self.total.to(more_EE.device) + more_EE


def eliminate_experts(gram_EE: torch.Tensor, groups: int = 1) -> Scores:
    """The step at which each expert goes, high: stays longest; [experts], or [groups, experts in a group]. Of equal ones the
    last goes first: everywhere the lower index stays."""
    gram = gram_EE.double().cpu().numpy()
    count = len(gram)
    group_of, cost = np.arange(count) // (count // groups), gram.diagonal().copy()
    steps, gone = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=bool)
    for step in range(count):
        lost = np.bincount(group_of, weights=gone, minlength=groups)
        open_to = ~gone & (lost[group_of] == lost.min())
        least = cost[open_to].min()
        one = int(np.flatnonzero(open_to & (cost == least))[-1])
        steps[one], gone[one] = step, True
        cost += 2 * gram[one]
    return steps.reshape(groups, -1).squeeze(0) if groups == 1 else steps.reshape(groups, -1)
