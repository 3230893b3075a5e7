"""Computes the distillation loss over the whole vocabulary from hidden states, never holding [tokens x vocabulary].

For each chunk of tokens both models' logits are computed into two buffers that are used again by the next chunk; the
formulas of a row turn them into the loss and its closed-form gradient; two products carry that to the student's hidden
states and head. So the gradient is there when the forward ends, nothing is kept for the backward but the two
gradients, and the memory beside them does not depend on how many tokens there are. (The chunking of the head follows
Cut Cross-Entropy, arXiv 2411.09009, and Liger, arXiv 2410.10989, section 3.2.)

On CUDA the formulas are one Triton kernel (`fused.py`), which reads the fp32 logits of both models twice and writes the
gradient in the dtype of the products. In bf16 that gradient has a buffer of its own, of half the size a token, which
holds four chunks before it is multiplied. The head's fp32 gradient is read and written by each product that adds to it:
8 bytes an element for 2 x tokens operations, so that 512 tokens at a time (128 operations a byte) would wait for the
memory of an H200, which pays for 206 operations a byte, and 2,048 tokens (512 a byte) do not. Elsewhere the formulas are
torch's own operations (`rows.py`). `docs/performance.md` has the sum of bytes and operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitron.runtime.loss import products
from minitron.runtime.loss.head import Head
from minitron.runtime.loss.products import accumulate_outer, as_factor, project, project_back, scale_
from minitron.runtime.loss.rows import TorchRows
from minitron.runtime.loss.sampled import SampledTargets
from minitron.runtime.loss.settings import DistillationLoss
from minitron.specs.loss_chunks import loss_chunks

if TYPE_CHECKING:
    from minitron.runtime.loss.fused import TritonRows


@dataclass(frozen=True)
class LossTerms:
    """The loss and its terms: call backward on `total`. The terms are detached and unweighted; each is a share of a
    global mean: the sum over this call's tokens divided by the normaliser. `divergence` carries no temperature^2.
    `divergence_T` has the same for each token, not divided."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    divergence_T: Tensor


# parameters: a loss takes its tensors one by one, as torch's own do
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
    valid_T: Tensor | None = None,
    head_gradient_VD: Tensor | None = None,
    teacher_SV: Tensor | None = None,
) -> LossTerms:
    """Computes the loss of T tokens, its gradient flowing to `student_TD` and to the student's head.

    `labels_T` (the next tokens) are needed only where `cross_entropy` is not 0, the teacher only where `weight` is
    not 0. Stored samples (`targets`, drawn at `temperature`) may stand in for the teacher where the divergence is
    forward_kl: its value and its gradient are then right in expectation. Tokens that are not `valid_T` (bool; None: all
    are) count nothing, whatever stands in their rows; their samples may not have an entropy.

    The sums over tokens are divided by `normaliser`: give the number of valid tokens of the global batch
    (all ranks, all accumulation steps), and the sum of all calls is the mean over it. With T = 0 the loss is 0 and
    its gradient zeros. `compute_dtype` is what the student's head is multiplied in on CUDA; products come out in
    fp32 everywhere.

    `head_gradient_VD` (fp32) is a sum of gradients to which that of the head is added while the loss is computed: no
    second tensor of its size is made, and backward then leaves the head alone. Backward must be called on `total`, or on a
    sum with it; nothing may multiply it.

    `teacher_SV` are the products of the first tokens with the teacher's head, where `shared_logits` made them before: they are
    read, and not changed.
    """
    assert normaliser > 0, "a batch without a single valid token has no mean; give 1"
    assert settings.weight == 0 or targets is not None or (teacher is not None and teacher_TE is not None)
    if targets is not None:
        assert settings.divergence == "forward_kl", "the others need the whole distribution"
        assert targets.ids_TN.shape[0] == student_TD.shape[0], "the samples are those of other tokens"
    assert settings.cross_entropy == 0 or labels_T is not None
    assert head_gradient_VD is None or head_gradient_VD.dtype == torch.float32
    if settings.weight == 0 or targets is not None:
        teacher_TE = teacher = None
    if settings.weight == 0:
        targets = None
    work = _Work(
        settings, student, teacher_TE, teacher, targets, labels_T, valid_T, normaliser, compute_dtype,
        None if teacher is None else teacher_SV,
    )  # fmt: skip
    total, parts, divergence_T = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_TD, student.weight_VD, student.bias_V, work, head_gradient_VD
    )
    return LossTerms(total, parts[0], parts[1], divergence_T)


@dataclass(frozen=True)
class _Work:
    """The inputs of a loss that no gradient flows to."""

    settings: DistillationLoss
    student: Head
    teacher_TE: Tensor | None
    teacher: Head | None
    targets: SampledTargets | None
    labels_T: Tensor | None
    valid_T: Tensor | None
    normaliser: float
    compute_dtype: torch.dtype
    teacher_SV: Tensor | None = None

    def teacher_logits(self, part: slice, into_CV: Tensor, *, scratch: bool) -> Tensor:
        """Returns the products of a part of the tokens with the teacher's head, those that are kept or in `into_CV`; with
        `scratch` the caller may change them."""
        assert self.teacher is not None and self.teacher_TE is not None
        kept = self.teacher_SV
        if kept is None or part.stop > kept.shape[0]:
            project(self.teacher_TE[part], self.teacher.weight_VD, into_CV)
            return into_CV
        return into_CV.copy_(kept[part]) if scratch else kept[part]


@dataclass(frozen=True)
class _Results:
    """The gradients that are wanted, the head's and the bias's to be added to, and each token's divergence and -log
    p."""

    grad_TD: Tensor | None
    grad_VD: Tensor | None
    grad_V: Tensor | None
    values_2T: Tensor


class _ChunkedLoss(torch.autograd.Function):
    """Computes the loss and its gradients in forward; backward returns them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        work: _Work,
        into_VD: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fp32: dict[str, Any] = {"device": student_TD.device, "dtype": torch.float32}
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_VD = into_VD
        if needs_weight and into_VD is None:
            grad_VD = torch.zeros(weight_VD.shape, **fp32)
        found = _Results(
            torch.empty_like(student_TD, memory_format=torch.contiguous_format) if needs_hidden else None,
            grad_VD if needs_weight else None,
            torch.zeros(weight_VD.shape[0], **fp32) if needs_bias else None,
            torch.empty(2, student_TD.shape[0], **fp32),
        )
        # Autocast would turn the products of this function back into bf16.
        with torch.autocast(student_TD.device.type, enabled=False):
            _compute(work, student_TD, found)  # its buffers are free again before anything is copied
        ctx.added = into_VD is not None
        ctx.gradients = (
            found.grad_TD,
            found.grad_VD.to(weight_VD.dtype) if found.grad_VD is not None and into_VD is None else None,
            found.grad_V.to(bias_V.dtype) if found.grad_V is not None and bias_V is not None else None,
        )
        settings = work.settings
        sums = found.values_2T.sum(1, dtype=torch.float64)
        if work.targets is not None:
            sums[0] -= work.targets.entropy
        parts = (sums / work.normaliser).float()
        total = parts[0] * (settings.weight * settings.temperature**2) + parts[1] * settings.cross_entropy
        divergence_T = found.values_2T[0]
        ctx.mark_non_differentiable(parts, divergence_T)
        return total, parts, divergence_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_terms: Tensor) -> tuple[Tensor | None, ...]:
        # Let go of them, so that autograd takes the head's gradient over instead of copying it.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a distillation loss can be taken once; compute the loss again")
        if not ctx.added:
            scale_(gradients, upstream)
        elif upstream.device.type == "cpu" and bool(upstream != 1):
            raise RuntimeError("the head's gradient was added to a sum already: nothing may multiply the loss")
        return (*gradients, None, None)


def _compute(work: _Work, student_TD: Tensor, found: _Results) -> None:
    """Fills `found`: chunks of logits one after the other, products of their gradients where a buffer of them is
    full."""
    settings, device = work.settings, student_TD.device
    tokens, vocabulary = student_TD.shape[0], work.student.vocabulary
    student = replace(
        work.student,
        weight_VD=work.student.weight_VD.detach(),
        bias_V=None if work.student.bias_V is None else work.student.bias_V.detach(),
    )
    if device.type == "cuda":
        student = student.in_dtype(work.compute_dtype)
    fused = fuses(device)
    dtype = student.weight_VD.dtype if fused and products.on_tensor_cores(student.weight_VD) else torch.float32
    chunks = loss_chunks(device.type, tokens, vocabulary, settings.chunk_tokens, dtype.itemsize)
    rows: TorchRows | TritonRows
    if fused:
        from minitron.runtime.loss.fused import TritonRows

        rows = TritonRows(settings, student, work.teacher, 1.0 / work.normaliser)
    else:
        rows = TorchRows(settings, student, work.teacher, 1.0 / work.normaliser, chunks.logits)
    student_CV = torch.empty(chunks.logits, vocabulary, dtype=torch.float32, device=device)
    teacher_CV = torch.empty_like(student_CV) if work.teacher is not None else None
    # In fp32 a gradient takes the place of its logit.
    grad_GV = student_CV if dtype == torch.float32 else student_CV.new_empty(chunks.gradients, vocabulary, dtype=dtype)
    for begin in range(0, tokens, chunks.gradients):
        group = slice(begin, min(begin + chunks.gradients, tokens))
        for start in range(group.start, group.stop, chunks.logits):
            part = slice(start, min(start + chunks.logits, group.stop))
            z_CV = student_CV[: part.stop - part.start]
            project(student_TD[part], student.weight_VD, z_CV)
            theirs: Tensor | SampledTargets | None = None if work.targets is None else work.targets.part(part)
            if teacher_CV is not None:
                theirs = work.teacher_logits(part, teacher_CV[: part.stop - part.start], scratch=not fused)
            rows.to_gradient(
                z_CV,
                theirs,
                None if work.labels_T is None else work.labels_T[part],
                None if work.valid_T is None else work.valid_T[part],
                grad_GV[part.start - begin : part.stop - begin],
                found.values_2T[:, part],
            )
        grad_CV = as_factor(grad_GV[: group.stop - begin], student.weight_VD)
        if found.grad_TD is not None:
            project_back(grad_CV, student.weight_VD, found.grad_TD[group])
        if found.grad_VD is not None:
            accumulate_outer(grad_CV, student_TD[group], student.weight_VD, found.grad_VD)
        if found.grad_V is not None:
            found.grad_V.add_(grad_CV.sum(0, dtype=torch.float32))


@lru_cache
def fuses(device: torch.device) -> bool:
    """Checks whether the formulas run as one kernel on `device`: on CUDA, where Triton is installed as it is with
    torch."""
    return device.type == "cuda" and find_spec("triton") is not None
