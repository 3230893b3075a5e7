"""Computes three divergences between the teacher's distribution q and the student's p, row by row, with their
gradients.

Each function gets log-probabilities and probabilities of both in fp32, returns the value of every row, and leaves
in `log_p_RV` the gradient with respect to the student's logits *divided by the temperature*, `u = logits /
temperature`. `p_RV` stays as it is, the other two are scratch afterwards: nothing of the size of a block is
allocated. All values fall to zero at p = q, and so do the gradients: differences are taken before anything is
multiplied, so that a small divergence keeps its leading digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LARGEST_EXPONENT = 80.0
"""exp(80) is finite in fp32; where q exceeds p by more than that factor, p is 0 in fp32 and the clamp changes
nothing."""


def log_softmax_(z_RV: Tensor, probabilities_RV: Tensor) -> None:
    """Turns logits into log-probabilities in place and writes the probabilities beside them: one exponential for
    both."""
    z_RV.sub_(z_RV.amax(-1, keepdim=True))
    total_R1 = torch.exp(z_RV, out=probabilities_RV).sum(-1, keepdim=True)
    z_RV.sub_(total_R1.log())
    probabilities_RV.div_(total_R1)


def _difference_(log_a_RV: Tensor, log_b_RV: Tensor, a_RV: Tensor) -> Tensor:
    """Computes log a - log b in place, and 0 where a is 0: the summand a (log a - log b) is 0 there, impossible to both
    or not."""
    return log_a_RV.sub_(log_b_RV).masked_fill_(a_RV == 0, 0.0)


def forward_kl(log_p_RV: Tensor, p_RV: Tensor, log_q_RV: Tensor, q_RV: Tensor) -> Tensor:
    """Computes KL(q || p) = sum q (log q - log p); its gradient is p - q. (Hinton et al., arXiv 1503.02531, section
    2.)"""
    value_R = _difference_(log_q_RV, log_p_RV, q_RV).mul_(q_RV).sum(-1)
    torch.sub(p_RV, q_RV, out=log_p_RV)
    return value_R


def reverse_kl(log_p_RV: Tensor, p_RV: Tensor, log_q_RV: Tensor, q_RV: Tensor) -> Tensor:
    """Computes KL(p || q) = sum p (log p - log q); its gradient is p (log p - log q - KL). (MiniLLM, arXiv 2306.08543,
    section 2.1.)"""
    _difference_(log_p_RV, log_q_RV, p_RV)
    value_R = torch.mul(p_RV, log_p_RV, out=q_RV).sum(-1)
    log_p_RV.sub_(value_R.unsqueeze(-1)).mul_(p_RV)
    return value_R


def jsd(log_p_RV: Tensor, p_RV: Tensor, log_q_RV: Tensor, q_RV: Tensor) -> Tensor:
    """Computes (KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2; gradient p (log p/m - KL(p || m)) / 2.

    (Agarwal et al., arXiv 2306.13649, equation 1, with beta = 1/2.) With d = log q - log p, log p/m is -log(1 +
    (e^d - 1) / 2): as it stands it is exact for small d, so the value comes from it. The gradient does not see a
    constant added to log p/m, so it comes from log p/m - log 2 = -log(1 + e^d), which is exact where p and q have
    nothing in common and log p/m itself would be log 2 less a rounding error.
    """
    # Both -inf: 0. Infinite: finite, so that a probability of 0 times it is 0.
    d_RV = log_q_RV.sub_(log_p_RV).nan_to_num_(nan=0.0)
    value_R = _minus_log_over_mean(d_RV, out=log_p_RV).mul_(p_RV).sum(-1)
    d_RV.neg_()
    value_R += _minus_log_over_mean(d_RV, out=log_p_RV).mul_(q_RV).sum(-1)
    softplus_RV = torch.logaddexp(d_RV.neg_(), d_RV.new_zeros(()), out=log_p_RV)
    mean_R1 = torch.mul(p_RV, softplus_RV, out=q_RV).sum(-1, keepdim=True)
    softplus_RV.sub_(mean_R1).mul_(p_RV).mul_(-0.5)
    return value_R.mul_(-0.5)


def _minus_log_over_mean(d_RV: Tensor, out: Tensor) -> Tensor:
    """Computes -log p/m from d = log q - log p, and -log q/m from -d."""
    return torch.clamp(d_RV, max=_LARGEST_EXPONENT, out=out).expm1_().mul_(0.5).log1p_()


DIVERGENCES: dict[DivergenceName, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
