"""Three divergences between the teacher's distribution q and the student's p, row by row, with their gradients.

Each function takes log-probabilities in fp32 and returns the value of every row and its gradient with respect to
the student's logits *divided by the temperature*, `u = logits / temperature`. All of them fall to zero at p = q,
and so do the gradients: differences are taken before anything is multiplied, so that a small divergence keeps its
leading digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_LARGEST_EXPONENT = 80.0
"""exp(80) is finite in fp32; where q exceeds p by more than that factor, p is 0 in fp32 and the clamp changes
nothing."""


def forward_kl(log_p_RV: Tensor, log_q_RV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p); its gradient is p - q. (Hinton et al., arXiv 1503.02531, section 2.)"""
    q_RV = log_q_RV.exp()
    value_R = (log_q_RV - log_p_RV).mul_(q_RV).sum(-1)
    return value_R, log_p_RV.exp().sub_(q_RV)


def reverse_kl(log_p_RV: Tensor, log_q_RV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q); its gradient is p (log p - log q - KL). (MiniLLM, arXiv 2306.08543,
    section 2.1.)"""
    p_RV, ratio_RV = log_p_RV.exp(), log_p_RV - log_q_RV
    value_R = (p_RV * ratio_RV).sum(-1)
    return value_R, ratio_RV.sub_(value_R.unsqueeze(-1)).mul_(p_RV)


def jsd(log_p_RV: Tensor, log_q_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2; gradient p (log p/m - KL(p || m)) / 2.

    (Agarwal et al., arXiv 2306.13649, equation 1, with beta = 1/2.) With d = log q - log p, log p/m is -log(1 +
    (e^d - 1) / 2): as it stands it is exact for small d, so the value comes from it. The gradient does not see a
    constant added to log p/m, so it comes from log p/m - log 2 = -log(1 + e^d), which is exact where p and q have
    nothing in common and log p/m itself would be log 2 minus a crumb.
    """
    p_RV, difference_RV = log_p_RV.exp(), log_q_RV - log_p_RV
    value_R = _log_over_mean(difference_RV).mul_(p_RV).sum(-1)
    value_R += _log_over_mean(-difference_RV).mul_(log_q_RV.exp()).sum(-1)
    shifted_RV = torch.nn.functional.softplus(difference_RV).neg_()
    mean_R1 = (p_RV * shifted_RV).sum(-1, keepdim=True)
    return value_R.mul_(0.5), shifted_RV.sub_(mean_R1).mul_(p_RV).mul_(0.5)


def _log_over_mean(difference_RV: Tensor) -> Tensor:
    """log p/m from log q - log p."""
    return torch.expm1(difference_RV.clamp(max=_LARGEST_EXPONENT)).mul_(0.5).log1p_().neg_()


DIVERGENCES: dict[DivergenceName, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
