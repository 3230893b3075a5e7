"""The list of every cost of a plan, with its basis, in the order in which it is shown."""

from __future__ import annotations

from minitron.compiler.estimate.estimate import CONTEXT, Estimate
from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.memory import EXACT_PARTS
from minitron.compiler.estimate.phases import Cost, Phase


def all_costs(estimate: Estimate, hardware: HardwareAssumptions) -> list[Cost]:
    """Every figure with its basis, in the order in which it is shown."""
    spec = estimate.plan.loaded.spec
    length = spec.distill.sequence_length if spec.distill is not None else CONTEXT
    found: list[Cost] = []
    scan = "" if estimate.plan.teacher.captured.length is None else ", without what its scan computes"
    for side, model in (("teacher", estimate.teacher_costs), ("student", estimate.student_costs)):
        decode = model.flops_per_token + length * model.attention_flops_per_pair
        found += [
            Cost(f"{side}: weights", model.weight_bytes, "bytes", "exact"),
            Cost(f"{side}: KV cache per token", model.kv_cache_bytes_per_token, "bytes", "exact"),
            Cost(f"{side}: KV cache", model.kv_cache_bytes(length), "bytes", "exact", f"of {length} tokens"),
            Cost(
                f"{side}: prefill per token", model.forward_flops_per_token(length), "FLOPs", "estimated",
                f"of {length} tokens{scan}",
            ),
            Cost(f"{side}: decode per token", decode, "FLOPs", "estimated", f"after {length} tokens{scan}"),
        ]  # fmt: skip
    for phase in estimate.phases(hardware):
        found += _phase_costs(phase, hardware)
    return found


def _phase_costs(phase: Phase, hardware: HardwareAssumptions) -> list[Cost]:
    name = phase.name.replace("_", " ")
    if phase.tokens:
        found = [Cost(f"{name}: tokens", phase.tokens, "tokens", "exact")]
        found.append(Cost(f"{name}: work per token", phase.flops // phase.tokens, "FLOPs", "estimated"))
    else:  # of weights alone
        found = [Cost(f"{name}: work", phase.flops, "FLOPs", "estimated")]
    for part, size in phase.memory.parts.items():
        if size:
            basis = "exact" if part in EXACT_PARTS else "estimated"
            found.append(Cost(f"{name}: {part} per device", size, "bytes", basis))
    found.append(Cost(f"{name}: peak memory per device", phase.memory.peak, "bytes", "estimated"))
    if phase.disk:
        basis = "estimated" if phase.name == "capture" else "exact"
        found.append(Cost(f"{name}: disk", phase.disk, "bytes", basis, "at most" if phase.name == "capture" else ""))
    if phase.float8:
        found.append(Cost(f"{name}: of it in float8", phase.float8 // phase.tokens, "FLOPs", "estimated"))
    hours, days = phase.hours(hardware), phase.seconds(hardware)
    found.append(Cost(f"{name}: device-hours", hours, "hours", "estimated", hardware.words))
    found.append(Cost(f"{name}: days", days / 86400, "days", "estimated", hardware.words))
    return found
