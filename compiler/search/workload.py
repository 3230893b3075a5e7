"""A student at work: whether a workload fits a device, and an estimate of its speed by a roofline.

    memory      the weights, and the key-value cache of `concurrency` requests of input + output tokens
    a step      one token for each request: the larger of the time to read the weights and the caches, half of the output
                written, at the device's bandwidth, and the time of its operations at the device's peak
    a token     a step, and the request's share of reading the prompts: concurrency x input tokens at the peak, over output

Nothing is taken off for a kernel's overhead, so the figure is a lower bound; it compares shapes, which overheads hardly do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minitron.compiler.estimate.devices import DEVICES, Device
from minitron.compiler.search.pricing import Prices
from minitron.specs.blocks.search import Workload
from minitron.specs.errors import Problem
from minitron.specs.suggest import did_you_mean

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Served:
    """The memory in bytes that a workload takes of each shape, and the milliseconds of a token (an estimate)."""

    memory: Seconds
    milliseconds: Seconds


def device_of(workload: Workload) -> Device:
    """Returns the device of a workload whose name `check_workload` accepts."""
    return DEVICES[workload.device]


def check_workload(workload: Workload | None) -> list[Problem]:
    """Checks that the workload names a device whose bandwidth is known."""
    if workload is None or workload.device in DEVICES:
        return []
    meant = did_you_mean(workload.device, list(DEVICES))
    message = f"`{workload.device}` is not a device whose bandwidth is known"
    return [Problem("search.budget.workload.device", message, f"{meant}write one of {', '.join(DEVICES)}")]


def served(workload: Workload, prices: Prices) -> Served:
    """Returns what a workload takes of each shape on its device."""
    device = device_of(workload)
    tokens = workload.input + workload.output
    cache = prices.kv_cache_bytes_per_token.astype(np.float64)
    weights = prices.weight_bytes.astype(np.float64)
    context = workload.input + workload.output / 2
    memory = weights + workload.concurrency * tokens * cache
    read = (weights + workload.concurrency * context * cache) / device.bandwidth
    compute = workload.concurrency * (prices.flops_per_token + context * prices.pairs) / device.flops
    prefill = (
        workload.concurrency
        * workload.input
        * (prices.flops_per_token + workload.input / 2 * prices.pairs)
        / device.flops
    )
    return Served(memory, 1e3 * (np.maximum(read, compute) + prefill / workload.output))
