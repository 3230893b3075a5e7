"""Values stored in fewer bits than they are computed in: bf16 by stochastic rounding, and 8 bits by blocks.

Rounding to the nearest loses every change that is smaller than half a step: a bf16 weight has steps of 1/256 of itself, so
that a training whose changes are a thousandth of a weight stands still. Rounded up or down at random, in proportion to the
distance, a weight moves by the change in expectation (Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192,
section 3).

8 bits: each block of a row is divided by its largest magnitude, and what is left is one of 256 numbers whose steps grow
with them, seven decades in all (dynamic tree quantization; Dettmers et al., 8-bit Optimizers via Block-wise
Quantization, arXiv 2110.02861, section 2). Blocks do not cross rows, so that rows can be spread over ranks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds fp32 to bf16, up or down at random, so that the expectation is `exact`. Values that bf16 represents stay
    as they are; so do infinities.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-1 << 16).view(torch.float32)
    # Added to an exponent of all ones, noise would make another number of an infinity.
    return torch.where(exact.isfinite(), rounded, exact).to(torch.bfloat16)


@lru_cache
def code_book(signed: bool, device: torch.device) -> Tensor:
    """Returns the 256 numbers from -1 (unsigned: 0) to 1, ascending. Each decade has twice as many as the one below
    it.
    """
    numbers = [0.0, 1.0]
    for decade in range(_DECADES):
        count = 1 << (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - _DECADES)).tolist()
        numbers += [*middles, *(-middle for middle in middles)] if signed else middles
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


def blocks_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the number of rows of a tensor with two dimensions or more, and the number of blocks in each row."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], -(-columns // BLOCK)


def _in_blocks(exact: Tensor) -> Tensor:
    """Reshapes a tensor to [rows, blocks, BLOCK], the last block of a row padded with zeros."""
    rows, blocks = blocks_of(tuple(exact.shape))
    flat = exact.reshape(rows, -1)
    return torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.shape[1])).view(rows, blocks, BLOCK)


def quantize(exact: Tensor, signed: bool, codes: Tensor, scales: Tensor) -> None:
    """Writes the nearest codes (uint8, of the shape of `exact`) and each block's largest magnitude (fp32)."""
    if not exact.numel():
        return
    in_blocks = _in_blocks(exact)
    largest = in_blocks.abs().amax(-1)
    book = code_book(signed, exact.device)
    parts = in_blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
    nearest = torch.bucketize(parts, (book[1:] + book[:-1]) / 2, out_int32=True)
    codes.copy_(nearest.flatten(1)[:, : exact[0].numel()].reshape(exact.shape))
    scales.copy_(largest)


def dequantize(codes: Tensor, signed: bool, scales: Tensor) -> Tensor:
    """Returns the values in fp32."""
    if not codes.numel():
        return torch.zeros(codes.shape, device=codes.device)
    parts = code_book(signed, codes.device)[codes.reshape(codes.shape[0], -1).long()]
    return (parts * scales.repeat_interleave(BLOCK, 1)[:, : parts.shape[1]]).view(codes.shape)
