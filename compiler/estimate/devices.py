"""The devices that a plan can be estimated for. h100, h200 and b200 multiply in float8 twice as fast, by the same sheets.

    name      memory   bandwidth  dense bf16   source
    a100-40   40 GB    1.56 TB/s  312 TFLOP/s  NVIDIA A100 Tensor Core GPU data sheet
    a100-80   80 GB    2.04 TB/s  312 TFLOP/s  the same, SXM
    h100      80 GB    3.35 TB/s  989 TFLOP/s  NVIDIA H100 data sheet, SXM; half of the figure given with sparsity
    h200      141 GB   4.8 TB/s   989 TFLOP/s  NVIDIA H200 data sheet, SXM; half of the figure given with sparsity
    b200      180 GB   8 TB/s     2250 TFLOP/s NVIDIA HGX B200 data sheet, an eighth of the board; half of that with sparsity
    this      this machine: its CUDA devices, else its memory and a matrix product in fp32 that is timed on the spot

Memory is counted in the vendor's decimal gigabytes. What a driver reports above them, 5 to 7%, is left to its own
context, the communication library and fragmentation.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

from minitron.specs.errors import UsageError
from minitron.specs.float8 import CAPABILITY
from minitron.specs.suggest import did_you_mean

GB = 10**9
THIS = "this"
MOST_DEVICES = 1 << 16
TRIAL = 1024  # rows of the square matrices that a CPU is timed with


@dataclass(frozen=True)
class Device:
    """`flops`: the most floating-point operations a second, dense, in bf16 on CUDA and in fp32 on a CPU; `bandwidth`: bytes a
    second between the processor and its memory, where they are known; `float8`: how many times as fast products in float8
    are, 0 where a GPU has none."""

    name: str
    memory_bytes: int
    flops: float
    kind: str = "cuda"
    bandwidth: float = 0.0
    float8: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Several devices of one kind that train together."""

    device: Device
    count: int = 1

    @property
    def name(self) -> str:
        """The cluster as the command line spells it: h200x8."""
        return self.device.name + (f"x{self.count}" if self.count > 1 else "")

    @property
    def flops(self) -> float:
        return self.device.flops * self.count


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 40 * GB, 312e12, bandwidth=1.56e12),
        Device("a100-80", 80 * GB, 312e12, bandwidth=2.04e12),
        Device("h100", 80 * GB, 989e12, bandwidth=3.35e12, float8=2.0),
        Device("h200", 141 * GB, 989e12, bandwidth=4.8e12, float8=2.0),
        Device("b200", 180 * GB, 2250e12, bandwidth=8e12, float8=2.0),
    )
}
REFERENCE = DEVICES["h100"]
ALIASES = {"a100": "a100-80", "cpu": THIS, "cuda": THIS}


def read_device(text: str) -> Cluster:
    """`h200x8`, `a100`, `this`. UsageError with the list of devices for anything else."""
    match = re.fullmatch(r"(?P<name>[a-z][a-z0-9-]*?)(?:\s*x\s*(?P<count>[1-9]\d{0,5}))?", text.strip().lower())
    name = ALIASES.get(match["name"], match["name"]) if match else ""
    count = int(match["count"] or 1) if match else 0
    if name == THIS and count == 1:
        return this_machine(cpu=text.strip().lower() == "cpu")
    if name not in DEVICES or count > MOST_DEVICES:
        meant = did_you_mean(match["name"] if match else text, [*DEVICES, *ALIASES, THIS])
        raise UsageError(
            f"--device {text}: not a device that a plan can be estimated for; {meant}write one of "
            f"{', '.join(DEVICES)} or this (this machine), with a number of them behind it: h200x8"
        )
    return Cluster(DEVICES[name], count)


def this_machine(*, cpu: bool = False) -> Cluster:
    """Returns the devices that this process would train on. Imports torch; a CPU is timed for a moment."""
    import torch

    if torch.cuda.is_available() and not cpu:
        properties = torch.cuda.get_device_properties(0)
        known = next((one for one in DEVICES.values() if one.name.split("-")[0] in properties.name.lower()), REFERENCE)
        float8 = 2.0 if (properties.major, properties.minor) >= CAPABILITY else 0.0
        return Cluster(Device(THIS, properties.total_memory, known.flops, float8=float8), torch.cuda.device_count())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Cluster(Device(THIS, memory, _timed_flops(), "cpu", float8=1.0))


def _timed_flops() -> float:
    """The best of a few products of square matrices in fp32."""
    import torch

    a, b = torch.randn(TRIAL, TRIAL), torch.randn(TRIAL, TRIAL)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return float(2 * TRIAL**3 / best)
