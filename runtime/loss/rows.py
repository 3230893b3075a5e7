"""Computes the formulas between logits and gradient in torch's own operations, a block of rows at a time.

The reference for `fused.py`, and what runs on a CPU: a block is small enough for the processor's cache, so that its
temporaries never reach memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.runtime.loss.divergence import DIVERGENCES, log_softmax_
from minitron.runtime.loss.head import Head
from minitron.runtime.loss.sampled import SampledTargets, cross_entropy_
from minitron.runtime.loss.settings import DistillationLoss
from minitron.specs.loss_chunks import BLOCK_ELEMENTS


class TorchRows:
    """Turns chunks of logits into values and gradients, in scratch of its own."""

    def __init__(
        self,
        settings: DistillationLoss,
        student: Head,
        teacher: Head | None,
        share: float,
        chunk: int,
    ) -> None:
        """Prepares buffers; `share` is the weight of one token in the global mean, `chunk` the most tokens of a
        call."""
        device = student.weight_VD.device
        self.settings, self.student, self.teacher, self.share = settings, student, teacher, share
        self.rows = max(1, min(chunk, BLOCK_ELEMENTS[device.type] // student.vocabulary))

        def scratch(needed: bool) -> Tensor:
            return torch.empty(self.rows if needed else 0, student.vocabulary, dtype=torch.float32, device=device)

        self.p_RV, self.q_RV = scratch(True), scratch(teacher is not None)
        self.cross_RV = scratch(settings.cross_entropy != 0)
        self.slope_RV = scratch(student.softcap is not None)

    def to_gradient(
        self,
        z_CV: Tensor,
        teacher: Tensor | SampledTargets | None,
        labels_C: Tensor | None,
        valid_C: Tensor | None,
        out_CV: Tensor,
        values_2C: Tensor,
    ) -> None:
        """Writes d loss / d z_CV to `out_CV`, which is `z_CV` itself, and each token's divergence (with samples: its
        cross-entropy with them) and -log p(label) to `values_2C`. The teacher's logits [C, V] become scratch. Rows
        that are not valid get zeros, whatever their logits are."""
        assert out_CV.data_ptr() == z_CV.data_ptr()
        values_2C.zero_()
        for start in range(0, z_CV.shape[0], self.rows):
            part = slice(start, start + self.rows)
            z_RV = z_CV[part]
            rows = z_RV.shape[0]
            self.student.finish_(z_RV, self.slope_RV[:rows] if self.student.softcap is not None else None)
            cross_RV = None
            if labels_C is not None and self.settings.cross_entropy:
                cross_RV = self.cross_RV[:rows]
                values_2C[1, part] = self._cross_entropy(z_RV, labels_C[part], cross_RV)
            if teacher is not None:
                values_2C[0, part] = (
                    self._sampled_(z_RV, teacher.part(part))
                    if isinstance(teacher, SampledTargets)
                    else self._divergence_(z_RV, teacher[part])
                )
            else:
                z_RV.zero_()
            if cross_RV is not None:
                z_RV.add_(cross_RV)
            if self.student.softcap is not None:
                z_RV.mul_(self.slope_RV[:rows])
            if self.student.scale != 1.0:
                z_RV.mul_(self.student.scale)
        if valid_C is not None:
            z_CV.masked_fill_(~valid_C.unsqueeze(-1), 0.0)
            values_2C.masked_fill_(~valid_C, 0.0)

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
        """Does the same with samples of the teacher, for forward_kl; returns their cross-entropy in each row."""
        settings = self.settings
        if settings.temperature != 1.0:
            z_RV.div_(settings.temperature)
        p_RV = self.p_RV[: z_RV.shape[0]]
        log_softmax_(z_RV, p_RV)
        return cross_entropy_(z_RV, p_RV, targets, settings.weight * settings.temperature * self.share)

    def _cross_entropy(self, z_RV: Tensor, labels_R: Tensor, grad_RV: Tensor) -> Tensor:
        """Writes the gradient of the weighted cross-entropy to `grad_RV` and returns -log p(label) of each row."""
        p_RV, index_R1, weight = self.p_RV[: z_RV.shape[0]], labels_R.unsqueeze(-1), self.settings.cross_entropy
        log_softmax_(grad_RV.copy_(z_RV), p_RV)
        likelihood_R = grad_RV.gather(-1, index_R1).squeeze(-1)
        torch.mul(p_RV, weight * self.share, out=grad_RV)
        grad_RV.scatter_add_(-1, index_R1, grad_RV.new_full(index_R1.shape, -weight * self.share))
        return likelihood_R.neg_()
