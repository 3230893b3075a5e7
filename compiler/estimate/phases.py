"""The phases of a plan and single figures, as the plan document has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.memory import Memory


@dataclass(frozen=True)
class Phase:
    """One line of the plan. `does` says what for; `flops` of the whole phase, `float8` those of them that are of products in
    float8, `disk` what it leaves there; `memory` is that of one device."""

    name: str
    does: str
    tokens: int
    flops: int
    memory: Memory
    disk: int = 0
    float8: int = 0

    def to_json(self, hardware: HardwareAssumptions) -> dict[str, Any]:
        return {
            "name": self.name,
            "does": self.does,
            "tokens": self.tokens,
            "flops": self.flops,
            "float8_flops": self.float8,
            "peak_memory_bytes": self.memory.peak,
            "memory_bytes": dict(self.memory.parts),
            "device_hours": round(hardware.hours(self.flops, self.float8), 6),
            "days": round(hardware.seconds(self.flops, self.float8) / 86400, 6),
            "disk_bytes": self.disk,
            "device": hardware.words,
        }


@dataclass(frozen=True)
class Cost:
    """One figure. `basis` is exact (follows from shapes and the spec) or estimated."""

    name: str
    value: float
    unit: str
    basis: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "unit": self.unit, "basis": self.basis, "note": self.note}
