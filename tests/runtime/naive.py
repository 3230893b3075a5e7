"""The losses written down as in the papers, in fp64, with [tokens x vocabulary] and autograd: what the fast code
must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitron.runtime.loss import DistillationLoss, Head


def logits(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight_VD.T
    if head.bias_V is not None:
        z = z + head.bias_V
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def divergence(name: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    assert name == "jsd"
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((q * (log_q - log_m)).sum(-1) + (p * (log_p - log_m)).sum(-1)) / 2


def loss(
    settings: DistillationLoss,
    hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    labels: Tensor,
    normaliser: float,
) -> Tensor:
    s, t = logits(hidden, student), logits(teacher_hidden, teacher)
    kd = divergence(settings.divergence, s / settings.temperature, t / settings.temperature).sum()
    nll = -s.log_softmax(-1).gather(-1, labels[:, None]).sum()
    return (settings.weight * settings.temperature**2 * kd + settings.cross_entropy * nll) / normaliser
