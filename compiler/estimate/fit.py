"""Checks whether a plan fits the devices, and finds the nearest change that makes the plan fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minitron.compiler.estimate.choice import WAYS
from minitron.compiler.estimate.devices import MOST_DEVICES, Cluster
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.memory import Layout
from minitron.specs.float8 import CAPABILITY

GIB = 2**30
_CAPABILITY = ".".join(map(str, CAPABILITY))


def fits_json(estimate: Estimate, hardware: HardwareAssumptions) -> dict[str, Any]:
    """`fits` of a plan: {device, ok, nearest}; `nearest` is null where all fits, or where no change that is tried does.

    Changes are tried in this order, each alone with what stands in the spec: fewer sequences at a time, recomputation,
    both, a sharded teacher, that and both, the teacher in float8, that and all before, then more devices, first as the spec
    is, then with all of that; where a global batch cannot be shared by the devices, also fewer of them. On a device without
    float8: the same in bf16.
    """
    cluster = hardware.cluster
    found: dict[str, Any] = {"device": cluster.name, "ok": False, "nearest": None, "reason": None}
    for phase in estimate.phases(hardware):
        if phase.name in ("calibrate", "refit", "capture") and phase.memory.peak > cluster.device.memory_bytes:
            found["reason"] = f"{phase.name} needs {size_words(phase.memory.peak)} on one device"
            found["nearest"] = f"a device with more memory for `{phase.name}`, or --device cpu for that command"
            return found
        if phase.name == "search" and phase.memory.peak > cluster.device.memory_bytes:
            found["reason"] = (
                f"search needs {size_words(phase.memory.peak)} on one device, which holds teacher and candidate whole"
            )
            found["nearest"] = "a device with more memory for `search`, or a smaller `search.budget`"
            return found
    if estimate.plan.loaded.spec.distill is None:
        return found | {"ok": True}
    stretches = list(estimate.stretches())
    for number, (name, one) in enumerate(stretches):
        layout = one.layout(cluster.count)
        reason = _why_not(name, one, cluster, layout)
        if reason is None:
            continue
        found["reason"] = reason
        for changes, devices, changed in _changes(one, cluster, layout):
            if _why_not(name, one, Cluster(cluster.device, devices), changed) is None:
                peak = max(_peaks(name, one, cluster, changed).values())
                words = " and ".join(changes) + f" ({size_words(peak)} per device)"
                own = f"distill.phases.{number}.micro_batch_size"
                found["nearest"] = words if len(stretches) == 1 else words.replace("distill.micro_batch_size", own)
                break
        return found
    return found | {"ok": True}


def _why_not(name: str, estimate: Estimate, cluster: Cluster, layout: Layout) -> str | None:
    """Explains why a stretch of the distillation, or the correction of the teacher before it, does not fit the devices; None
    where both do."""
    whole = estimate.distill.batch
    if whole % cluster.count:
        return f"{whole} sequences of a global batch cannot be shared equally by {cluster.count} devices"
    if (layout.float8_student or layout.float8_teacher) and not cluster.device.float8:
        return f"{cluster.device.name} has no products in float8: that needs compute capability {_CAPABILITY} or later"
    peaks = _peaks(name, estimate, cluster, layout)
    largest = max(peaks, key=lambda phase: peaks[phase])
    if peaks[largest] > cluster.device.memory_bytes:
        has = size_words(cluster.device.memory_bytes)
        return f"{largest} needs {size_words(peaks[largest])} per device, {cluster.device.name} has {has}"
    return None


def _peaks(name: str, estimate: Estimate, cluster: Cluster, layout: Layout) -> dict[str, int]:
    """The memory of one device by phase."""
    peaks = {name: estimate.training(cluster.device.kind, layout).peak}
    if estimate.plan.loaded.spec.teacher_correction is not None:
        peaks["teacher_correction"] = estimate.training(cluster.device.kind, layout, correction=True).peak
    return peaks


def _changes(estimate: Estimate, cluster: Cluster, layout: Layout) -> Iterator[tuple[list[str], int, Layout]]:
    """Yields each change: the lines to write, the number of devices, and the resulting layout."""
    change = _Change(estimate, cluster)
    if not cluster.device.float8 and (layout.float8_student or layout.float8_teacher):
        of = {"distill": layout.float8_student, "teacher": layout.float8_teacher}
        words = [f"{block}.compute: bfloat16" for block, is_float8 in of.items() if is_float8]
        for more, changed in change.around(replace(layout, float8_student=False, float8_teacher=False)):
            yield words + more, cluster.count, changed
        return
    for words, changed in (*change.each(layout), *change.sharded(layout), *change.in_float8(layout)):
        yield words, cluster.count, changed
    for devices in _other_counts(estimate.distill.batch, cluster.count):
        words = [f"--device {Cluster(cluster.device, devices).name}"]
        for more, changed in change.around(replace(estimate.layout(devices), recompute=layout.recompute)):
            yield words + more, devices, changed


def _other_counts(batch: int, count: int) -> Iterator[int]:
    """Yields numbers of devices that share a global batch equally: more than `count`, doubled; where `count` devices cannot
    share it, also fewer."""
    more = 2 * count
    while more <= min(batch, MOST_DEVICES):
        if batch % more == 0:
            yield more
        more *= 2
    if batch % count:
        yield from (fewer for fewer in range(count - 1, 0, -1) if batch % fewer == 0)


Changed = tuple[list[str], Layout]
"""The lines to write, and the layout that they result in."""


@dataclass(frozen=True)
class _Change:
    """The kinds of changes, each of a layout that is given."""

    estimate: Estimate
    cluster: Cluster

    def smaller(self, base: Layout) -> Iterator[Changed]:
        """Fewer sequences at a time."""
        batch = self.estimate.distill.batch
        for micro in range(base.micro_batch - 1, 0, -1):
            if batch % (base.devices * micro) == 0:
                steps = batch // (base.devices * micro)
                yield [f"distill.micro_batch_size: {micro}"], replace(base, micro_batch=micro, steps=steps)

    def recomputed(self, base: Layout) -> Iterator[Changed]:
        """More recomputation."""
        for way in WAYS[WAYS.index(base.recompute) + 1 :]:
            word = "true" if way is True else way
            yield [f"distill.gradient_checkpointing: {word}"], replace(base, recompute=way)

    def each(self, base: Layout) -> Iterator[Changed]:
        """Fewer sequences, more recomputation, and both."""
        yield from self.smaller(base)
        for words, changed in self.recomputed(base):
            yield words, changed
            for more, both in self.smaller(changed):
                yield words + more, both

    def sharded(self, base: Layout) -> Iterator[Changed]:
        """A sharded teacher, and all of the above with it."""
        if base.devices > 1 and not base.teacher_sharded and not self.estimate.sampled:
            words, changed = ["distill.layout.teacher: sharded"], replace(base, teacher_sharded=True)
            yield words, changed
            for more, both in self.each(changed):
                yield words + more, both

    def in_float8(self, base: Layout) -> Iterator[Changed]:
        """The teacher in float8, and all of the above with it."""
        device = self.cluster.device
        if device.kind == "cuda" and device.float8 and not (base.float8_teacher or self.estimate.sampled):
            words, changed = ["teacher.compute: float8"], replace(base, float8_teacher=True)
            yield words, changed
            for more, both in (*self.each(changed), *self.sharded(changed)):
                yield words + more, both

    def around(self, base: Layout) -> Iterator[Changed]:
        """The layout as it is, then with all changes but float8."""
        yield [], base
        yield from self.each(base)
        yield from self.sharded(base)


def size_words(value: int) -> str:
    """Returns a number of bytes in GiB or MiB."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"
