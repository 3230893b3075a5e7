"""Distillation over the whole vocabulary from hidden states, never holding [tokens x vocabulary].

For each chunk of tokens both models' logits are computed into two buffers that are used again by the next chunk; a
block of rows at a time, small enough for the processor's cache, turns them into the loss and, in place, into its
closed-form gradient; two products carry that to the student's hidden states and head. So the gradient is there when
the forward ends, nothing is kept for the backward but the two gradients, and the memory beside them does not depend
on how many tokens there are. (The chunking of the head follows Cut Cross-Entropy, arXiv 2411.09009, and Liger,
arXiv 2410.10989, section 3.2.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minitron.runtime.loss.divergence import DIVERGENCES, DivergenceName, log_softmax_
from minitron.runtime.loss.head import Head
from minitron.runtime.loss.products import accumulate_outer, project, project_back, scale_
from minitron.runtime.loss.sampled import SampledTargets, cross_entropy_

_BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Size of one logits buffer. Enough rows for an efficient product, little beside the gradient of the head itself."""

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits that the row formulas handle at a time. On a CPU 8 MiB: the temporaries stay in the shared cache, and the
pieces are not so small that threads spend their time waiting for each other."""


@dataclass(frozen=True)
class DistillationLoss:
    """What is minimised: `weight * temperature^2 * divergence + cross_entropy * (-log p(label))`, averaged over tokens.

    The temperature divides the logits of both models in the divergence (not in the cross-entropy); its square keeps the
    gradient's size independent of it (Hinton et al., arXiv 1503.02531, section 2). `weight` 0 needs no teacher.
    `chunk_tokens` bounds a chunk from above; a large vocabulary makes it smaller.
    """

    divergence: DivergenceName = "forward_kl"
    temperature: float = 1.0
    weight: float = 1.0
    cross_entropy: float = 0.0
    chunk_tokens: int = 1024


@dataclass(frozen=True)
class LossTerms:
    """`total` is what to call backward on. The terms are detached and unweighted; each is a share of a global mean:
    the sum over this call's tokens divided by the normaliser. `divergence` carries no temperature^2. `divergence_T` has
    the same for each token, not divided."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    divergence_T: Tensor


def distillation_loss(
    settings: DistillationLoss,
    student_TD: Tensor,
    student: Head,
    teacher_TE: Tensor | None,
    teacher: Head | None,
    labels_T: Tensor | None,
    *,
    normaliser: float,
    compute_dtype: torch.dtype = torch.float32,
    targets: SampledTargets | None = None,
) -> LossTerms:
    """The loss of T valid tokens, its gradient flowing to `student_TD` and to the student's head.

    `labels_T` (the next tokens) are needed only where `cross_entropy` is not 0, the teacher only where `weight` is
    not 0. Stored samples (`targets`, drawn at `temperature`) may stand in for the teacher where the divergence is
    forward_kl: its value and its gradient are then right in expectation.

    The sums over tokens are divided by `normaliser`: give the number of valid tokens of the global batch
    (all ranks, all accumulation steps), and the sum of all calls is the mean over it. With T = 0 the loss is 0 and
    its gradient zeros. `compute_dtype` is what the student's head is multiplied in on CUDA; products come out in
    fp32 everywhere.
    """
    assert normaliser > 0, "a batch without a single valid token has no mean; give 1"
    assert settings.weight == 0 or targets is not None or (teacher is not None and teacher_TE is not None)
    if targets is not None:
        assert settings.divergence == "forward_kl", "the others need the whole distribution"
        assert targets.ids_TN.shape[0] == student_TD.shape[0], "the samples are those of other tokens"
    assert settings.cross_entropy == 0 or labels_T is not None
    total, parts, divergence_T = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_TD,
        student.weight_VD,
        student.bias_V,
        student,
        teacher_TE if settings.weight and targets is None else None,
        teacher,
        targets if settings.weight else None,
        labels_T,
        settings,
        normaliser,
        compute_dtype,
    )
    return LossTerms(total, parts[0], parts[1], divergence_T)


class _ChunkedLoss(torch.autograd.Function):
    """Forward: the loss and its gradients. Backward: hands them out."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        student: Head,
        teacher_TE: Tensor | None,
        teacher: Head | None,
        targets: SampledTargets | None,
        labels_T: Tensor | None,
        settings: DistillationLoss,
        normaliser: float,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = student_TD.device
        fp32: dict[str, Any] = {"device": device, "dtype": torch.float32}
        tokens, vocabulary = student_TD.shape[0], weight_VD.shape[0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Autocast would turn the products of this function back into bf16.
        with torch.autocast(device.type, enabled=False):
            student = replace(student, weight_VD=weight_VD.detach(), bias_V=None if bias_V is None else bias_V.detach())
            if device.type == "cuda":
                student = student.in_dtype(compute_dtype)
            if teacher_TE is None:
                teacher = None
            chunk = max(1, min(settings.chunk_tokens, tokens, _BUFFER_BYTES[device.type] // (4 * vocabulary)))
            rows = _Rows(settings, student, teacher, 1.0 / normaliser, chunk, device)
            student_CV = torch.empty(chunk, vocabulary, **fp32)
            teacher_CV = torch.empty(chunk if teacher is not None else 0, vocabulary, **fp32)
            grad_TD = torch.empty(student_TD.shape, **fp32) if needs_hidden else None
            grad_VD = torch.zeros(weight_VD.shape, **fp32) if needs_weight else None
            grad_V = torch.zeros(vocabulary, **fp32) if needs_bias else None
            sums = torch.zeros(2, dtype=torch.float64, device=device)
            divergence_T = torch.zeros(tokens, **fp32)
            for start in range(0, tokens, chunk):
                part = slice(start, min(start + chunk, tokens))
                z_CV = student_CV[: part.stop - start]
                project(student_TD[part], student.weight_VD, z_CV)
                t_CV = None
                if teacher is not None and teacher_TE is not None:
                    t_CV = teacher_CV[: part.stop - start]
                    project(teacher_TE[part], teacher.weight_VD, t_CV)
                labels_C = None if labels_T is None else labels_T[part]
                theirs = t_CV if targets is None else targets.part(part)
                sums += rows.to_gradient_(z_CV, theirs, labels_C, divergence_T[part])
                if grad_TD is not None:
                    project_back(z_CV, student.weight_VD, grad_TD[part])
                if grad_VD is not None:
                    accumulate_outer(z_CV, student_TD[part], student.weight_VD, grad_VD)
                if grad_V is not None:
                    grad_V += z_CV.sum(0)
        ctx.gradients = tuple(
            None if g is None else g.to(like.dtype)
            for g, like in (
                (grad_TD, student_TD),
                (grad_VD, weight_VD),
                (grad_V, weight_VD if bias_V is None else bias_V),
            )
        )
        if targets is not None:
            sums[0] -= targets.entropy
        parts = (sums / normaliser).float()
        total = parts[0] * (settings.weight * settings.temperature**2) + parts[1] * settings.cross_entropy
        ctx.mark_non_differentiable(parts, divergence_T)
        return total, parts, divergence_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_terms: Tensor) -> tuple[Tensor | None, ...]:
        # Let go of them, so that autograd takes the head's gradient over instead of copying it.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a distillation loss can be taken once; compute the loss again")
        scale_(gradients, upstream)
        return (*gradients, None, None, None, None, None, None, None, None)


class _Rows:
    """The formulas between the logits and the gradient of the loss, a block of rows at a time, in scratch of its
    own."""

    def __init__(
        self,
        settings: DistillationLoss,
        student: Head,
        teacher: Head | None,
        share: float,
        chunk: int,
        device: torch.device,
    ) -> None:
        """`share` is what one token counts in the global mean; `chunk` the most tokens of a call."""
        self.settings, self.student, self.teacher, self.share = settings, student, teacher, share
        self.rows = max(1, min(chunk, _BLOCK_ELEMENTS[device.type] // student.vocabulary))

        def scratch(needed: bool) -> Tensor:
            return torch.empty(self.rows if needed else 0, student.vocabulary, dtype=torch.float32, device=device)

        self.p_RV, self.q_RV = scratch(True), scratch(teacher is not None)
        self.cross_RV = scratch(settings.cross_entropy != 0)
        self.slope_RV = scratch(student.softcap is not None)

    def to_gradient_(
        self, z_CV: Tensor, teacher: Tensor | SampledTargets | None, labels_C: Tensor | None, divergence_C: Tensor
    ) -> Tensor:
        """Overwrites the student's `z_CV` by d loss / d z_CV, the teacher's logits [C, V] by scratch, and
        `divergence_C` by each token's divergence (of samples: their cross-entropy).

        Returns the sums of divergence and cross-entropy over the tokens.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=z_CV.device)
        for start in range(0, z_CV.shape[0], self.rows):
            part = slice(start, start + self.rows)
            z_RV = z_CV[part]
            rows = z_RV.shape[0]
            self.student.finish_(z_RV, self.slope_RV[:rows] if self.student.softcap is not None else None)
            cross_RV = None
            if labels_C is not None and self.settings.cross_entropy:
                cross_RV = self.cross_RV[:rows]
                sums[1] += self._cross_entropy(z_RV, labels_C[part], cross_RV)
            if teacher is not None:
                divergence_C[part] = (
                    self._sampled_(z_RV, teacher.part(part))
                    if isinstance(teacher, SampledTargets)
                    else self._divergence_(z_RV, teacher[part])
                )
                sums[0] += divergence_C[part].sum(dtype=torch.float64)
            else:
                z_RV.zero_()
            if cross_RV is not None:
                z_RV.add_(cross_RV)
            if self.student.softcap is not None:
                z_RV.mul_(self.slope_RV[:rows])
            if self.student.scale != 1.0:
                z_RV.mul_(self.student.scale)
        return sums

    def _divergence_(self, z_RV: Tensor, t_RV: Tensor) -> Tensor:
        """Leaves the gradient of the weighted divergence in `z_RV` and returns the divergence of each row."""
        settings = self.settings
        assert self.teacher is not None
        self.teacher.finish_(t_RV)
        if settings.temperature != 1.0:
            z_RV.div_(settings.temperature)
            t_RV.div_(settings.temperature)
        p_RV, q_RV = self.p_RV[: z_RV.shape[0]], self.q_RV[: z_RV.shape[0]]
        log_softmax_(z_RV, p_RV)
        log_softmax_(t_RV, q_RV)
        value_R = DIVERGENCES[settings.divergence](z_RV, p_RV, t_RV, q_RV)
        # temperature^2 of the loss, one of them cancelled by d (logits / temperature) / d logits
        z_RV.mul_(settings.weight * settings.temperature * self.share)
        return value_R

    def _sampled_(self, z_RV: Tensor, targets: SampledTargets) -> Tensor:
        """The same with samples of the teacher, for forward_kl; returns their cross-entropy in each row."""
        settings = self.settings
        if settings.temperature != 1.0:
            z_RV.div_(settings.temperature)
        p_RV = self.p_RV[: z_RV.shape[0]]
        log_softmax_(z_RV, p_RV)
        return cross_entropy_(z_RV, p_RV, targets, settings.weight * settings.temperature * self.share)

    def _cross_entropy(self, z_RV: Tensor, labels_R: Tensor, grad_RV: Tensor) -> Tensor:
        """Writes the gradient of the weighted cross-entropy to `grad_RV` and returns the sum of -log p(label)."""
        p_RV, index_R1, weight = self.p_RV[: z_RV.shape[0]], labels_R.unsqueeze(-1), self.settings.cross_entropy
        log_softmax_(grad_RV.copy_(z_RV), p_RV)
        likelihood = grad_RV.gather(-1, index_R1).sum(dtype=torch.float64)
        torch.mul(p_RV, weight * self.share, out=grad_RV)
        grad_RV.scatter_add_(-1, index_R1, grad_RV.new_full(index_R1.shape, -weight * self.share))
        return -likelihood
