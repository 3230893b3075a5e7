"""Computes the three matrix products of a language-model head, always with fp32 results, and the chain rule's factor.

A bf16 result would round logits of 20 to steps of 1/8 and with them every probability by up to 6%: near
convergence, where student and teacher differ by less, nothing of the gradient is left. So the products come out in
fp32: on CUDA by tensor cores with bf16 inputs and fp32 outputs, on the CPU by fp32 products of upcast inputs,
upcast a block of the vocabulary at a time so that no second copy of the head stands in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from minitron.specs.loss_chunks import HEAD_BLOCK


def _blocks(vocabulary: int) -> Iterator[slice]:
    return (slice(start, start + HEAD_BLOCK) for start in range(0, vocabulary, HEAD_BLOCK))


def on_tensor_cores(weight_VD: Tensor) -> bool:
    """Checks whether products with this head take bf16 (or fp16) inputs and give fp32 results."""
    return weight_VD.is_cuda and weight_VD.dtype in (torch.bfloat16, torch.float16)


def project(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Computes `out = hidden @ weight.T`."""
    if on_tensor_cores(weight_VD):
        torch.mm(hidden_CD.to(weight_VD.dtype), weight_VD.t(), out_dtype=torch.float32, out=out_CV)
    elif weight_VD.dtype == torch.float32:
        torch.mm(hidden_CD.float(), weight_VD.t(), out=out_CV)
    else:
        hidden_CD = hidden_CD.float()
        for block in _blocks(weight_VD.shape[0]):
            torch.mm(hidden_CD, weight_VD[block].float().t(), out=out_CV[:, block])


def as_factor(grad_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns the gradient of the logits in the dtype that both of the next products take, without a copy where it has
    it already."""
    return grad_CV.to(weight_VD.dtype) if on_tensor_cores(weight_VD) else grad_CV


def project_back(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """Computes `out = grad @ weight`, the gradient of `project` for the hidden states; `out` may be narrower than fp32.

    The sum over the vocabulary is fp32 all the way: a bf16 result would let the library add up bf16 parts of it."""
    if on_tensor_cores(weight_VD):
        if out_CD.dtype == torch.float32:
            torch.mm(grad_CV, weight_VD, out_dtype=torch.float32, out=out_CD)
        else:
            out_CD.copy_(torch.mm(grad_CV, weight_VD, out_dtype=torch.float32))
    elif weight_VD.dtype == torch.float32 and out_CD.dtype == torch.float32:
        torch.mm(grad_CV, weight_VD, out=out_CD)
    else:
        total_CD = torch.zeros(out_CD.shape, dtype=torch.float32, device=out_CD.device)
        for block in _blocks(weight_VD.shape[0]):
            total_CD.addmm_(grad_CV[:, block], weight_VD[block].float())
        out_CD.copy_(total_CD)


def accumulate_outer(grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, out_VD: Tensor) -> None:
    """Computes `out += grad.T @ hidden`, the gradient of `project` for the weight; `weight_VD` only says how to
    multiply.

    The product adds to the fp32 sum itself, so that no second gradient of the head exists, not even a block of it."""
    if on_tensor_cores(weight_VD):
        hidden_CD = hidden_CD.to(weight_VD.dtype)
        torch.addmm(out_VD, grad_CV.t(), hidden_CD, out_dtype=torch.float32, out=out_VD)
    else:
        out_VD.addmm_(grad_CV.t(), hidden_CD.float())


def scale_(gradients: Iterable[Tensor | None], upstream: Tensor) -> None:
    """Multiplies in place by the incoming gradient. A training calls backward on the loss itself, where that is 1 and
    on a CPU nothing is done; on CUDA a pass over them costs less than to wait for the device and look."""
    if upstream.device.type == "cpu" and bool(upstream == 1):
        return
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(upstream)
