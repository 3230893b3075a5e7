"""The utilisation of the devices by a training: memory, and the share of their peak FLOPs that goes into the models'
own arithmetic (model FLOPs utilisation; Chowdhery et al., arXiv 2204.02311, appendix B). Recomputation is not counted
as work.
"""

from __future__ import annotations

import re
import resource

import torch

PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)
"""The peak of each device by words of its name: floating-point operations a second in bf16, dense, as its maker states
them. The first match counts: the board before the chip. Words match whole: an RTX A4000 is not an A40.
"""


def peak_flops(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """Returns the peak FLOPs per second of one device; None where they are not known, or where training does not
    compute in bf16.
    """
    if device.type != "cuda" or compute_dtype != torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Returns the peak FLOPs per second of the device with this name; None where they are not known."""
    words = f" {re.sub('[^A-Za-z0-9]+', ' ', name)} "
    return next((peak for part, peak in PEAKS if f" {part} " in words), None)


def utilisation(
    flops_per_token: int | None, tokens_per_second: float, peak: float | None, devices: int
) -> float | None:
    """Returns the share of the peak of all `devices` together; None where a figure is not known."""
    if flops_per_token is None or peak is None:
        return None
    return flops_per_token * tokens_per_second / (peak * devices)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes: of the device's memory on CUDA, else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
