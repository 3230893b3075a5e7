"""The order in which a training asks for torch's attention kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_HOPPER = 9
"""The compute capability of the H100 and H200. FlashAttention 2, which torch includes, was written for earlier GPUs;
cuDNN's kernel uses the new instructions of these.
"""

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Makes scaled dot-product attention inside the context use the fastest kernel that supports the call, in forward
    passes and, where activations are recomputed, in backward passes. On devices other than Hopper torch's own order
    stands.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return nullcontext()
    kernels: AbstractContextManager[Any] = sdpa_kernel(_FASTEST_FIRST, set_priority=True)
    return kernels
