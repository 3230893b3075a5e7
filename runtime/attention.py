"""Which of torch's attention kernels a training asks for first."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_HOPPER = 9
"""Compute capability of the H100 and H200. torch's FlashAttention is version 2, written for the GPUs before them: cuDNN's
kernel uses what is new in these."""

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest_attention(device: torch.device) -> AbstractContextManager[Any]:
    """In here scaled dot-product attention takes the fastest kernel that can do what is asked; forward and, where
    activations are recomputed, backward. Elsewhere than on Hopper torch's own order stands."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return nullcontext()
    kernels: AbstractContextManager[Any] = sdpa_kernel(_FASTEST_FIRST, set_priority=True)
    return kernels
