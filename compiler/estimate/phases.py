"""The phases of a plan and single figures, as the plan document has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.memory import Memory


@dataclass(frozen=True)
class Phase:
    """One line of the plan. `does` says what for; `flops` of the whole phase, `float8` those of them that are of products in
    float8, `disk` what it leaves there; `memory` is that of one device. `waiting`: seconds of work on the CPU that is no
    product of matrices, while the devices wait."""

    name: str
    does: str
    tokens: int
    flops: int
    memory: Memory
    disk: int = 0
    float8: int = 0
    waiting: float = 0.0

    def seconds(self, hardware: HardwareAssumptions) -> float:
        """The seconds with all devices at work."""
        return hardware.seconds(self.flops, self.float8) + self.waiting

    def hours(self, hardware: HardwareAssumptions) -> float:
        """Device-hours."""
        return self.seconds(hardware) * hardware.cluster.count / 3600

    def to_json(self, hardware: HardwareAssumptions) -> dict[str, Any]:
        return {
            "name": self.name,
            "does": self.does,
            "tokens": self.tokens,
            "flops": self.flops,
            "float8_flops": self.float8,
            "peak_memory_bytes": self.memory.peak,
            "memory_bytes": dict(self.memory.parts),
            "device_hours": round(self.hours(hardware), 6),
            "days": round(self.seconds(hardware) / 86400, 6),
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
