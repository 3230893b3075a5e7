"""The phases between calibration and training: experts that are merged, and projections that are refitted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.estimate.memory import FP32, Memory, Shape
from minitron.compiler.estimate.phases import Phase
from minitron.compiler.graph.aten import op_name
from minitron.compiler.importance.accumulated import FP64
from minitron.compiler.importance.batches import batch_size, block_size
from minitron.compiler.importance.room import Sizes
from minitron.compiler.importance.row_blocks import fitted_at_once
from minitron.compiler.plan.plan import Plan
from minitron.compiler.roles.expert_weights import find_expert_weights
from minitron.compiler.roles.names import NUM_EXPERTS

# How often a layer runs while it is refitted: attention and feed-forward each read and write, and once more.
REFIT_RUNS = 5
# Matrices in fp64 of the rows that are fitted at a time: read, sliced, left over, solved.
FITTED_COPIES = 5
# Bytes for each pair of two experts' neurons that are compared: in fp32, and as the assignment takes it, in fp64.
COMPARED_BYTES = FP32 + FP64
# Seconds of assigning n neurons to n others on one core are this times n^2.5: measured on random weights, which have nothing in
# common, of 512 to 4,096 neurons, where it was 1.0e-9 to 1.7e-9; a third of it where a third of the weights is the same.
ASSIGNMENT_SECONDS = 1.2e-9


def assignment_seconds(neurons: int) -> float:
    """The seconds of finding the order of one expert's neurons in which they are nearest to another's."""
    return ASSIGNMENT_SECONDS * math.pow(neurons, 2.5)


@dataclass(frozen=True)
class Fitted:
    """The sizes of a projection of the teacher and of what becomes of it."""

    written: int
    read: int
    own_written: int
    own_read: int

    def gram_bytes(self, hidden: int) -> int:
        """The Gram matrix of what the student reads, its products with what the teacher reads and with what the residual stream
        of the student, `hidden` wide, lacks."""
        lacks = hidden if self.own_written == hidden else 0
        return FP64 * self.own_read * (self.own_read + self.read + lacks)

    def adding_bytes(self, tokens: int, hidden: int) -> int:
        """The values that both models read in a batch, and residual streams; a product of them, in fp32 and then in fp64."""
        values = FP32 * tokens * (self.read + self.own_read + 2 * hidden)
        return values + (FP32 + FP64) * self.own_read * max(self.own_read, self.read)

    def fitting_bytes(self, element: int) -> int:
        """Its regularised Gram matrix and the factor; the projection as it is stored, sliced, and fitted a block at a time."""
        block = min(fitted_at_once(self.read), self.written) * self.read * FITTED_COPIES * FP64
        whole = self.written * self.read * element + self.own_written * self.own_read * 2 * FP32
        return 2 * FP64 * self.own_read**2 + whole + block


def fitted_projections(plan: Plan) -> Iterator[Fitted]:
    """The projections that a refit changes, as far as shapes tell."""
    captured, table = plan.teacher.captured, plan.teacher.table
    reads = {one.weight: 1 if op_name(one.node) == "linear" else 0 for one in table.contractions if one.weight}
    times = Counter(one.weight for one in table.contractions)
    numbers = {old: new for new, old in enumerate(plan.layers)}
    theirs, own = stored_tensors(captured.model), stored_tensors(plan.model)
    for name, read in reads.items():
        layer = captured.layer_in_path(name)
        if times[name] != 1 or name not in theirs or (layer is not None and layer not in numbers):
            continue
        whole, narrow = theirs[name].shape, own[captured.renumbered(name, numbers)].shape
        if len(whole) == 2 and whole != narrow:
            yield Fitted(whole[1 - read], whole[read], narrow[1 - read], narrow[read])


def refit_phase(plan: Plan, sides: tuple[Shape, Shape], flops: int, sizes: Sizes, kind: str) -> Phase:
    """The phase that refits: teacher and student run side by side on one block of samples, each layer up to each stage, then
    whole. `flops` are those of one token through both; `sizes` those of calibration in fp32."""
    (teacher, student), data = sides, plan.loaded.spec.importance.data
    assert data is not None
    length = data.sequence_length
    sequences = min(data.samples, batch_size(length))
    tokens = min(data.samples, sequences * block_size(sequences, length, teacher.hidden)) * length
    found = list(fitted_projections(plan))
    element = plan.dtype.itemsize
    held = [one.gram_bytes(student.hidden) if kind == "cpu" else 0 for one in found]  # on CUDA they are in host memory
    adding = max(
        (gram + one.adding_bytes(sequences * length, teacher.hidden) for gram, one in zip(held, found, strict=True)),
        default=0,
    )
    fitting = max((gram + one.fitting_bytes(element) for gram, one in zip(held, found, strict=True)), default=0)
    parts = {
        "weights": max(sizes.layer + FP32 * student.layer, sizes.embedding),
        # Those of one graph are replaced batch by batch, and the old ones go together.
        "activations": tokens * FP32 * (2 * teacher.hidden + student.hidden),
        "transient": sequences * sizes.sample + sizes.stored,
        "matrices": max(adding, fitting if kind == "cpu" else 0),
    }
    running = parts["weights"] + max(parts["transient"] + max(held, default=0), adding)
    peak = parts["activations"] + max(running, fitting if kind == "cpu" else 0)
    does = f"fits the student's projections to the teacher's on {tokens // length} samples, layer by layer"
    return Phase("refit", does, tokens, tokens * REFIT_RUNS * flops, Memory(parts, peak))


def merge_phase(plan: Plan) -> Phase:
    """The phase that merges dropped experts into kept ones: each pair's neurons are compared and assigned, in host memory and
    on one core."""
    teacher, element = plan.teacher, plan.dtype.itemsize
    pairs = flops = matrices = experts = 0
    seconds = 0.0
    for layer in plan.layers:
        if layer not in teacher.roles.widths[NUM_EXPERTS]:
            continue
        weights = find_expert_weights(teacher.table, teacher.roles, layer)
        count, dropped = weights.channels.size.coefficient, weights.count - plan.targets.widths[NUM_EXPERTS]
        size = sum(teacher.captured.model.get_parameter(name).numel() for name in weights.axes)
        pairs += dropped
        flops += dropped * 2 * count * (size // weights.count)
        seconds += dropped * assignment_seconds(count)
        experts = max(experts, size * element)
        matrices = max(matrices, COMPARED_BYTES * count**2 + 2 * FP32 * size // weights.count)
    does = (
        f"aligns the neurons of up to {pairs} dropped experts with kept ones and merges them, one at a time, on the CPU"
    )
    memory = Memory({"weights": experts, "matrices": matrices}, experts + matrices)
    return Phase("merge_experts", does, 0, flops, memory, waiting=seconds)
