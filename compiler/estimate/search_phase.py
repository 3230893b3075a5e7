"""The phase of a search: candidates of a rung ride on one pass of the teacher, as many of them as a device holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minitron.compiler.estimate.devices import Device
from minitron.compiler.estimate.memory import FP32, Memory
from minitron.compiler.estimate.phases import Phase
from minitron.specs.halving import BRANCH_SHARE, RIDERS_SHARE
from minitron.specs.loss_chunks import SHARED_BYTES


@dataclass(frozen=True)
class Ride:
    """One candidate that trains alone: its memory, the FLOPs of a token in both models, and the size of the logits of one pass,
    tokens times vocabulary."""

    alone: Memory
    teacher_flops: int
    student_flops: int
    logits: int


def search_phase(device: Device, rungs: Sequence[Mapping[str, int]], ride: Ride) -> Phase:
    """Estimates a search on one device: candidates share the teacher's forward and its logits, and each has a branch over the
    end of the rung. Counted as if all were as large as `ride`."""
    before, tokens, flops = 0, 0, 0
    for rung in rungs:
        more = rung["tokens"] - before + int(BRANCH_SHARE * rung["tokens"])
        tokens += rung["enter"] * more
        flops += (rung["tokens"] - before) * ride.teacher_flops + rung["enter"] * more * ride.student_flops
        before = rung["tokens"]
    alone, each, riding = ride.alone, 2 * ride.alone.states, rungs[0]["enter"]
    if device.kind == "cuda":
        riding = max(1, min(riding, int(RIDERS_SHARE * (device.memory_bytes - alone.parts["teacher"])) // each))
    parts = {
        "other candidates": riding * each - alone.states,
        "shared logits": min(FP32 * ride.logits, SHARED_BYTES[device.kind]),
    }
    memory = Memory({**alone.parts, **parts}, alone.peak + sum(parts.values()))
    does = f"trains {rungs[0]['enter']} candidates on short stretches, {len(rungs)} rungs, and keeps the best"
    return Phase("search", does, tokens, flops, memory)
