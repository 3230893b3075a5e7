"""The hardware that a plan is estimated for: the devices, and the share of their peak that training is expected to
reach.

Model FLOPs utilisation (MFU): the operations that the mathematics asks for, in a second, over the most that the devices
can do. The default is no more hopeful than the two published distillation runs that say enough to tell: a 9B hybrid to
7B, 6.3B tokens in about 600 H100-hours, is 18%; a dense 8B to 6B, 50B tokens in about 3,000, is 25%
(benchmarks/estimates.py prints both).
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from minitron.compiler.estimate.devices import REFERENCE, THIS, Cluster, read_device
from minitron.specs.builds import PLAN, metrics_file
from minitron.specs.errors import UsageError
from minitron.specs.json_files import json_lines

DISTILL = "distill"
"""The name of the distillation among a plan's phases, and how the names of its own phases begin where it has several."""

ASSUMED_MFU = 0.17
ONE_REFERENCE = Cluster(REFERENCE)


@dataclass(frozen=True)
class HardwareAssumptions:
    """`named`: somebody asked whether the plan fits these devices."""

    cluster: Cluster = ONE_REFERENCE
    mfu: float = ASSUMED_MFU
    source: str = "assumed"
    named: bool = False

    def hours(self, flops: float, float8: float = 0.0) -> float:
        """Device-hours; `float8` of the operations are of products in float8, and reach the same share of a higher peak."""
        return in_peak_units(flops, float8, self.cluster) / (self.cluster.device.flops * self.mfu) / 3600

    def seconds(self, flops: float, float8: float = 0.0) -> float:
        """The seconds with all devices at work."""
        return 3600 * self.hours(flops, float8) / self.cluster.count

    @property
    def words(self) -> str:
        """The line of text below the phases."""
        name = "this machine" if self.cluster.device.name == THIS else self.cluster.name
        return f"{name} at {self.mfu:.3g} of its peak ({self.source})"


def in_peak_units(flops: float, float8: float, cluster: Cluster) -> float:
    """Returns the operations in bf16 that take as long as `flops`, of which `float8` are of products in float8."""
    faster = cluster.device.float8 or 1.0
    return flops - float8 * (1.0 - 1.0 / faster)


def read_hardware(device: str | None, mfu: float | None, measured: str | None) -> HardwareAssumptions:
    """From what stands on the command line; UsageError for what cannot be. `measured`: BUILD, or BUILD@DEVICE where it was
    trained on other devices than the plan is for."""
    cluster = ONE_REFERENCE if device is None else read_device(device)
    named = device is not None
    if mfu is not None and measured is not None:
        raise UsageError("--mfu and --measured both say how well devices are used; give one of them")
    if mfu is not None:
        if not 0 < mfu <= 1:
            raise UsageError(f"--mfu {mfu:g}: not a share of a device's peak; write a number such as 0.4")
        return HardwareAssumptions(cluster, mfu, "given with --mfu", named)
    if measured is None:
        return HardwareAssumptions(cluster, named=named)
    folder, at, where = measured.rpartition("@")
    build, on = (Path(folder), read_device(where)) if at else (Path(measured), cluster)
    return HardwareAssumptions(cluster, measured_mfu(build, on), f"measured: {build} on {on.name}", named)


def measured_mfu(build: Path, cluster: Cluster) -> float:
    """Returns the MFU that the training in `build` reached: its tokens a second times the FLOPs of a token in its plan,
    over the peak.

    The median over the steps of the later half, which caches and compilation no longer slow down.
    """
    metrics, plan = metrics_file(build), build / PLAN
    try:
        document = json.loads(plan.read_text(encoding="utf-8"))
        phases = [one for one in document["phases"] if one["name"].startswith(DISTILL)]
        work = sum(in_peak_units(one["flops"], one.get("float8_flops", 0), cluster) for one in phases)
        each = work / sum(one["tokens"] for one in phases)
        rates = [line["tokens_per_second"] for line in json_lines(metrics) if line.get("tokens_per_second")]
        rate = statistics.median(rates[len(rates) // 2 :])
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UsageError(
            f"--measured {build}: has no training that tells a speed ({type(error).__name__}: {error}); name a build "
            "whose plan.json and train/metrics.jsonl are those of a distillation that has begun"
        ) from None
    return float(rate * each / cluster.flops)
