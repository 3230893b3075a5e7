"""The phase of a search: candidates of a rung share one pass of the teacher, as many of them as a device holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minitron.compiler.estimate.devices import Device
from minitron.compiler.estimate.memory import FP32, Memory
from minitron.compiler.estimate.phases import Phase
from minitron.specs.halving import BRANCH_SHARE, LEARNERS_SHARE
from minitron.specs.loss_chunks import SHARED_BYTES


@dataclass(frozen=True)
class SharedPass:
    """One candidate that trains alone: its memory, the FLOPs of a token in both models, and the size of the logits of one pass,
    tokens times vocabulary."""

    alone: Memory
    teacher_flops: int
    student_flops: int
    logits: int


def search_phase(device: Device, rungs: Sequence[Mapping[str, int]], shared: SharedPass) -> Phase:
    """Estimates a search on one device: candidates share the teacher's forward and its logits, and each has a branch over the
    end of the rung. Counted as if all were as large as `shared`."""
    before, tokens, flops = 0, 0, 0
    for rung in rungs:
        more = rung["tokens"] - before + int(BRANCH_SHARE * rung["tokens"])
        tokens += rung["enter"] * more
        flops += (rung["tokens"] - before) * shared.teacher_flops + rung["enter"] * more * shared.student_flops
        before = rung["tokens"]
    alone, each, together = shared.alone, 2 * shared.alone.states, rungs[0]["enter"]
    if device.kind == "cuda":
        together = max(1, min(together, int(LEARNERS_SHARE * (device.memory_bytes - alone.parts["teacher"])) // each))
    parts = {
        "other candidates": together * each - alone.states,
        "shared logits": min(FP32 * shared.logits, SHARED_BYTES[device.kind]),
    }
    memory = Memory({**alone.parts, **parts}, alone.peak + sum(parts.values()))
    does = f"trains {rungs[0]['enter']} candidates on short stretches, {len(rungs)} rungs, and keeps the best"
    return Phase("search", does, tokens, flops, memory)
