"""The teacher's distribution as a few samples of it, drawn once and stored.

N tokens are drawn in proportion to the teacher's probabilities q, and each counts 1/N: the weights q^ that come out
have q as their expectation. The gradient of the forward KL is p - q, linear in q, so p - q^ has the true gradient as
its expectation (random sampling knowledge distillation, arXiv 2503.16870, section 4; keeping the most probable
tokens instead is biased).

The draws are systematic: one uniform number and N points at equal distances, in place of N uniform numbers. What a token
is expected to count stays N q, exactly; what it does count is N q rounded up or down, so it varies less than N
independent draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampledTargets:
    """The teacher's distributions for T tokens, at most N samples of each.

    ids_TN       the tokens that were drawn, each once; filled up with 0
    weights_TN   how often, divided by the number of draws: rows sum to 1; filled up with 0
    entropy      the sum over the T tokens of the entropy of q in nats: what makes a divergence of a cross-entropy
    """

    ids_TN: Tensor
    weights_TN: Tensor
    entropy: float

    def to(self, device: torch.device) -> SampledTargets:
        """Copies to `device`; from pinned memory without waiting."""
        ids_TN, weights_TN = (one.to(device, non_blocking=True) for one in (self.ids_TN, self.weights_TN))
        return SampledTargets(ids_TN, weights_TN, self.entropy)

    def pinned(self) -> SampledTargets:
        """Copies into memory that a GPU can read by itself."""
        return SampledTargets(self.ids_TN.pin_memory(), self.weights_TN.pin_memory(), self.entropy)

    def part(self, rows: slice) -> SampledTargets:
        """Returns these rows, without the entropy, which is that of all rows."""
        return SampledTargets(self.ids_TN[rows], self.weights_TN[rows], 0.0)


def draw(q_RV: Tensor, uniform_R: Tensor, draws: int) -> Tensor:
    """Returns systematic draws [R, draws] from each row of probabilities, ascending; `uniform_R` lies in [0, 1).

    In fp64: steps of an fp32 sum over a large vocabulary would round small probabilities away.
    """
    sums_RV = q_RV.double().cumsum(-1)
    total_R1 = sums_RV[:, -1:]
    points_RN = (torch.arange(draws, device=q_RV.device) + uniform_R.double().unsqueeze(-1)) / draws * total_R1
    # The last point may round to the total, behind which there is no token.
    points_RN = points_RN.minimum(torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(sums_RV, points_RN, right=True)


def count(ids_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts ascending draws: returns (ids of all rows one after the other, each once in its row; how often each was
    drawn; how many there are in each row)."""
    rows, draws = ids_RN.shape
    first_RN = torch.ones_like(ids_RN, dtype=torch.bool)
    first_RN[:, 1:] = ids_RN[:, 1:] != ids_RN[:, :-1]
    starts = first_RN.flatten().nonzero().squeeze(-1)
    ends = torch.cat([starts[1:], starts.new_tensor([rows * draws])]) if len(starts) else starts
    return ids_RN.flatten()[starts], ends - starts, first_RN.sum(-1)


def cross_entropy_(z_RV: Tensor, p_RV: Tensor, targets: SampledTargets, scale: float) -> Tensor:
    """Returns -sum q^ log p of each row from the student's log-probabilities `z_RV` and probabilities, and leaves
    `scale` (p - q^) in `z_RV`."""
    value_R = z_RV.gather(-1, targets.ids_TN).mul_(targets.weights_TN).sum(-1).neg_()
    torch.mul(p_RV, scale, out=z_RV)
    z_RV.scatter_add_(-1, targets.ids_TN, targets.weights_TN * -scale)
    return value_R
