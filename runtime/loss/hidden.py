"""Computes distances between hidden states of student and teacher, never holding [tokens x width] but for the gradient.

A chunk of tokens at a time: where the widths differ, the student's states are projected to the teacher's width, or the
teacher's are reduced to what the student keeps of them; the distance and its closed-form gradient are computed, and two
products carry that back to the states and the projection. So the gradient is there when the forward ends, as in
`distillation`.

The sum over pairs of states and its weight against the logit loss follow Minitron (arXiv 2407.14679, section 3:
L = L_logits + alpha L_is with alpha = L_logits / L_is, held constant for the gradient). The ratio is taken for each
sequence. Published code takes it for each micro batch; a sequence is the smallest of these, and then nothing depends
on how a batch is cut or shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minitron.runtime.loss.products import accumulate_outer, project, project_back, scale_

DistanceName = Literal["cosine", "mse"]

_SMALLEST = 1e-12
"""Norms below it count as it: a state of zeros has no direction, and its gradient is zero instead of NaN."""


@dataclass(frozen=True)
class HiddenStateLoss:
    """The settings of the distance. `cosine`: 1 - cos(projected student state, teacher state). `mse`: the mean over
    channels of the squared difference, in units of the mean square of that teacher state: a few tokens carry states
    hundreds of times as large as the others (Sun et al., arXiv 2402.17762) and would otherwise decide alone. (Minitron
    compares normalised states.) `weight` None: dynamic. `averaged`: over the pairs, instead of summed. `factor`: of the
    weight, at this step."""

    distance: DistanceName = "cosine"
    weight: float | None = None
    chunk_tokens: int = 1024
    averaged: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class HiddenStateTerm:
    """The loss and its distance: call backward on `total`; `distance` is detached and unweighted. Both are shares of a
    global mean: sums over pairs (or means over them) and tokens, divided by the normaliser."""

    total: Tensor
    distance: Tensor


# parameters: a loss takes its tensors one by one, as torch's own do
def hidden_state_loss(
    settings: HiddenStateLoss,
    students_TD: Sequence[Tensor],
    teachers_TE: Sequence[Tensor],
    projection_ED: Tensor | None,
    *,
    kept: Tensor | None = None,
    logits_T: Tensor,
    sequence_T: Tensor,
    sequences: int,
    normaliser: float,
    compute_dtype: torch.dtype = torch.float32,
) -> HiddenStateTerm:
    """Computes the loss of T valid tokens over pairs of states, its gradient flowing to the student's states and
    `projection_ED`.

    `projection_ED` takes states of width D to width E, one for all pairs; None where the widths are equal. `kept` goes the
    other way: the channels [D] of the teacher's states, or the components [E, D], that the student's are compared with.
    `logits_T` is the logit loss of each token as it stands in the total, and `sequence_T` the number of the token's sequence,
    below `sequences`: the dynamic weight needs them. With T = 0 the loss is 0 and its gradient zeros.
    """
    assert normaliser > 0 and len(students_TD) == len(teachers_TE) > 0
    assert kept is None or projection_ED is None
    total, distance = _ChunkedDistance.apply(  # type: ignore[no-untyped-call]
        projection_ED, settings, tuple(teachers_TE), kept, logits_T, sequence_T, sequences, normaliser, compute_dtype,
        *students_TD,
    )  # fmt: skip
    return HiddenStateTerm(total, distance.detach())


class _ChunkedDistance(torch.autograd.Function):
    """Computes the loss and its gradients in forward; backward returns them."""

    # parameters: an autograd function sees tensors only where each is an argument
    @staticmethod
    def forward(
        ctx: Any,
        projection_ED: Tensor | None,
        settings: HiddenStateLoss,
        teachers_TE: tuple[Tensor, ...],
        kept: Tensor | None,
        logits_T: Tensor,
        sequence_T: Tensor,
        sequences: int,
        normaliser: float,
        compute_dtype: torch.dtype,
        *students_TD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = students_TD[0].device
        with torch.autocast(device.type, enabled=False):
            weight_ED = None if projection_ED is None else projection_ED.detach()
            if weight_ED is not None and device.type == "cuda":
                weight_ED = weight_ED.to(compute_dtype)
            if kept is not None and kept.dim() == 2:
                kept = kept.T.contiguous()
                kept = kept.to(compute_dtype) if device.type == "cuda" else kept
            values_T = torch.zeros(logits_T.shape[0], device=device)
            pairs = [
                _Pair(settings, student, teacher, weight_ED, kept)
                for student, teacher in zip(students_TD, teachers_TE, strict=True)
            ]
            if settings.weight is None:
                for pair in pairs:
                    pair.add_values(values_T)
                weights_T = _dynamic(logits_T, values_T, sequence_T, sequences)
            else:
                each = settings.weight / (len(pairs) if settings.averaged else 1)
                weights_T = torch.full_like(values_T, each)
            shares_T = weights_T * (settings.factor / normaliser)
            grad_ED = None if projection_ED is None else torch.zeros_like(projection_ED, dtype=torch.float32)
            grads_TD = [
                pair.gradient(shares_T, grad_ED, values_T if settings.weight is not None else None) for pair in pairs
            ]
        ctx.gradients = (
            None if grad_ED is None or projection_ED is None else grad_ED.to(projection_ED.dtype),
            *(grad.to(student.dtype) for grad, student in zip(grads_TD, students_TD, strict=True)),
        )
        distance = values_T.sum(dtype=torch.float64) / (normaliser * (len(pairs) if settings.averaged else 1))
        total = (values_T.double() * shares_T.double()).sum()
        ctx.mark_non_differentiable(distance)
        return total.float(), distance.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _distance: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a hidden-state loss can be taken once; compute the loss again")
        scale_(gradients, upstream)
        return gradients[0], None, None, None, None, None, None, None, None, *gradients[1:]


def _dynamic(logits_T: Tensor, values_T: Tensor, sequence_T: Tensor, sequences: int) -> Tensor:
    """Computes L_logits / L_is of each token's sequence; 0 where the states are already equal."""
    sums_2S = torch.zeros(2, sequences, dtype=torch.float64, device=values_T.device)
    sums_2S[0].index_add_(0, sequence_T, logits_T.double())
    sums_2S[1].index_add_(0, sequence_T, values_T.double())
    ratio_S = torch.where(sums_2S[1] > 0, sums_2S[0] / sums_2S[1], 0.0)
    return ratio_S[sequence_T].float()


class _Pair:
    """The computation of one pair of states, a chunk of tokens at a time. `kept` are channels [D] or components
    [D, E]."""

    def __init__(
        self,
        settings: HiddenStateLoss,
        student_TD: Tensor,
        teacher_TE: Tensor,
        weight_ED: Tensor | None,
        kept: Tensor | None,
    ):
        assert weight_ED is not None or kept is not None or student_TD.shape == teacher_TE.shape
        self.kept = kept
        self.student_TD, self.teacher_TE, self.weight_ED = student_TD.detach(), teacher_TE, weight_ED
        self.formula = _cosine if settings.distance == "cosine" else _mse
        self.chunk = settings.chunk_tokens

    def add_values(self, values_T: Tensor) -> None:
        """Adds each token's distance to `values_T`."""
        for part in self._parts():
            values_T[part] += self.formula(self._projected(part), self._wanted(part))[0]

    def gradient(self, shares_T: Tensor, grad_ED: Tensor | None, values_T: Tensor | None) -> Tensor:
        """Returns the gradient [T, D] of sum(shares_T * distance), the projection's added to `grad_ED` and the
        distances to `values_T` where it is given."""
        grad_TD = torch.empty(self.student_TD.shape, dtype=torch.float32, device=self.student_TD.device)
        for part in self._parts():
            value_C, grad_CE = self.formula(self._projected(part), self._wanted(part))
            if values_T is not None:
                values_T[part] += value_C
            grad_CE.mul_(shares_T[part].unsqueeze(-1))
            if self.weight_ED is None:
                grad_TD[part] = grad_CE
            else:
                assert grad_ED is not None
                project_back(grad_CE, self.weight_ED, grad_TD[part])
                accumulate_outer(grad_CE, self.student_TD[part], self.weight_ED, grad_ED)
        return grad_TD

    def _parts(self) -> list[slice]:
        tokens = self.student_TD.shape[0]
        return [slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def _wanted(self, part: slice) -> Tensor:
        """The teacher's states in fp32, in the coordinates that they are compared in."""
        state_CE = self.teacher_TE[part]
        if self.kept is None:
            return state_CE.float()
        if self.kept.dim() == 1:
            return state_CE.index_select(1, self.kept).float()
        out_CD = torch.empty(state_CE.shape[0], self.kept.shape[0], device=state_CE.device)
        project(state_CE, self.kept, out_CD)
        return out_CD

    def _projected(self, part: slice) -> Tensor:
        state_CD = self.student_TD[part]
        if self.weight_ED is None:
            return state_CD.to(torch.float32, copy=True)
        out_CE = torch.empty(state_CD.shape[0], self.weight_ED.shape[0], device=state_CD.device)
        project(state_CD, self.weight_ED, out_CE)
        return out_CE


def _cosine(u_CE: Tensor, v_CE: Tensor) -> tuple[Tensor, Tensor]:
    """Computes 1 - cos(u, v) and its gradient for u. With unit vectors it is |u - v|^2 / 2: that keeps its leading
    digits where the two nearly agree, and is never negative."""
    size_C1 = u_CE.norm(dim=-1, keepdim=True).clamp_min_(_SMALLEST)
    unit_CE = u_CE.div_(size_C1)
    difference_CE = unit_CE - v_CE / v_CE.norm(dim=-1, keepdim=True).clamp_min_(_SMALLEST)
    value_C = difference_CE.square().sum(-1).mul_(0.5)
    along_C1 = (unit_CE * difference_CE).sum(-1, keepdim=True)
    slope_C1 = torch.where(size_C1 > _SMALLEST, size_C1.reciprocal(), 0.0)
    return value_C, difference_CE.addcmul_(unit_CE, along_C1, value=-1.0).mul_(slope_C1)


def _mse(u_CE: Tensor, v_CE: Tensor) -> tuple[Tensor, Tensor]:
    """Computes |u - v|^2 / |v|^2 and its gradient for u."""
    size_C1 = v_CE.square().sum(-1, keepdim=True).clamp_min_(_SMALLEST)
    difference_CE = u_CE.sub_(v_CE)
    value_C = difference_CE.square().sum(-1).div_(size_C1.squeeze(-1))
    return value_C, difference_CE.mul_(2.0 / size_C1)
