"""The most memory that one device holds while it calibrates or trains, part by part.

    weights      the student's in fp32 (on CUDA in bf16 where the spec says so), or its share where it is sharded
    gradients    as the weights; they live from the first backward of a step to its end
    optimizer    two moments of AdamW, one of Muon's matrices, in fp32, bf16 or 8 bits
    teacher      in the checkpoint's dtype; fp32 on a CPU, as the runtime holds it there; in float8 a byte a weight
    gathered     sharded models (FSDP): the unit outside the layers and two layers, whole, and a layer's whole gradient
    activations  what the student's forward keeps for the backward, for one micro batch
    transient    what lives beside that for a moment, in either model
    logits       the buffers of the chunked loss, the gradients of hidden states and head, the teacher's states that are
                 compared and the gradients of the student's

Weights, gradients and moments follow from shapes alone: they are exact. Activations are found by running the model
without data (`footprint`); how these parts meet in time is what makes the peak an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron.compiler.estimate.activations import Footprint
from minitron.compiler.estimate.float8 import NO_LINEARS, Linears, linears_of
from minitron.compiler.importance.room import LOGIT_COPIES, Room, Sizes
from minitron.specs.blocks.distill import Recomputation
from minitron.specs.blocks.training import is_matrix
from minitron.specs.loss_chunks import BLOCK_ELEMENTS, loss_chunks

FP32 = 4
MOMENT_BYTES = {"float32": 8.0, "bfloat16": 4.0, "int8": 2 + 8 / 256}
"""The bytes of both moments of AdamW, a parameter: 8 bits have an fp32 scale for each block of 256. Muon's matrices
have half."""

# The residual stream, a layer's input and its norm's output: modules that call each other hold them through the layer; of a
# graph the first is in its stream, and the others are let go of when they are read for the last time.
HELD_BY_MODULES = 3
GATHERED_LAYERS = 2  # FSDP gathers the next layer while one computes


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide memory, in parameters; `outside` counts those in no layer, `layer` the largest
    layer, `matrices` the matrices of all layers."""

    parameters: int
    layer: int
    outside: int
    hidden: int
    vocabulary: int
    float8: Linears = NO_LINEARS
    matrices: int = 0


def shape_of(model: torch.nn.Module, layer_path: str, head: str, config: Mapping[str, Any]) -> Shape:
    """`head` names the parameter [vocabulary, hidden]; `config` is the model's configuration."""
    layers: dict[str, int] = {}
    outside = matrices = 0
    prefix = layer_path + "."
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            number = name[len(prefix) :].split(".", 1)[0]
            layers[number] = layers.get(number, 0) + parameter.numel()
            matrices += parameter.numel() if is_matrix(parameter.shape) else 0
        else:
            outside += parameter.numel()
    vocabulary, hidden = model.get_parameter(head).shape
    whole = sum(layers.values()) + outside
    linears = linears_of(model, layer_path, config)
    return Shape(whole, max(layers.values()), outside, hidden, vocabulary, linears, matrices)


@dataclass(frozen=True)
class Layout:
    """The layout of a training over devices. `micro_batch` sequences go through a device at a time, `steps` times per
    optimizer step. `offload`: the student's states rest in host memory."""

    devices: int
    micro_batch: int
    steps: int
    student_sharded: bool
    teacher_sharded: bool
    recompute: Recomputation
    offload: bool = False
    bf16_weights: bool = False
    moments: str = "float32"
    float8_student: bool = False
    float8_teacher: bool = False
    compiled: bool = False
    muon: bool = False

    @property
    def shards_student(self) -> bool:
        return self.student_sharded and (self.devices > 1 or self.offload)

    @property
    def shards_teacher(self) -> bool:
        return self.teacher_sharded and self.devices > 1


@dataclass(frozen=True)
class LossWork:
    """The settings of the loss that decide memory, for one sequence of `length` tokens. `compared` counts the hidden states
    of each model that are compared."""

    length: int
    chunk_tokens: int
    cross_entropy: bool
    softcap: bool
    compared: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by part, and the most of them that live together."""

    parts: Mapping[str, int]
    peak: int

    @property
    def states(self) -> int:
        """The bytes of weights, gradients and moments."""
        return sum(self.parts[part] for part in ("weights", "gradients", "optimizer"))


@dataclass(frozen=True)
class Running:
    """A model that runs in a training step, and what it holds for one micro batch beside its weights."""

    shape: Shape
    footprint: Footprint


EXACT_PARTS = ("weights", "gradients", "optimizer", "teacher")


def training_memory(
    kind: str,
    layout: Layout,
    running: Running,
    beside: Running | None,
    teacher_bytes: int,
    work: LossWork,
) -> Memory:
    """The memory of a training step: `running` is the model that learns, `beside` the teacher, None where none runs.
    `kind` is cpu or cuda; `teacher_bytes` the bytes of an element in the teacher's checkpoint."""
    student, own = running.shape, running.footprint
    teacher, others = (None, Footprint(0, 0)) if beside is None else (beside.shape, beside.footprint)
    share = layout.devices if layout.shards_student else 1
    mine = -(-student.parameters // share)
    if layout.offload and layout.shards_student and kind == "cuda":
        mine = 0  # they rest in host memory
    element = 2 if layout.bf16_weights and kind == "cuda" else FP32  # a CPU holds the same numbers in fp32
    states, moments = mine * element, math.ceil(mine * moment_bytes(student, layout.moments, layout.muon))
    compute = 2 if kind == "cuda" else FP32
    tokens = layout.micro_batch * work.length
    own_transient, their_transient = own.transient, others.transient
    if layout.float8_student:
        own_transient += student.float8.beside(tokens, kind, training=True, compiled=layout.compiled)
    held, each = 0, teacher_bytes if kind == "cuda" else FP32
    if teacher is not None:
        linears = teacher.float8 if layout.float8_teacher else NO_LINEARS
        held = linears.held(teacher.parameters, each)
        their_transient += linears.beside(tokens, kind, training=False, compiled=layout.compiled)
    gathered = 0
    if layout.shards_student:
        units = student.outside + GATHERED_LAYERS * student.layer
        gathered += units * compute + student.layer * (compute + FP32)
    if teacher is not None and layout.shards_teacher:
        in_layers = (held - teacher.outside * each) / (teacher.parameters - teacher.outside)  # bytes a parameter
        held = -(-held // layout.devices)
        gathered += teacher.outside * each + math.ceil(GATHERED_LAYERS * teacher.layer * in_layers)
    head_gradient = student.vocabulary * student.hidden * FP32
    logits = logits_bytes(kind, layout.micro_batch, work, student, teacher)
    if layout.shards_student or layout.steps == 1 or element != FP32:
        logits += head_gradient  # else it is added to the one that is there
    before = states if layout.steps > 1 else 0  # gradients of the micro batches before this one
    begun = 0 if layout.steps > 1 else head_gradient
    together = max(
        before + own.kept + logits,
        before + own.kept + own_transient + begun,
        before + their_transient,
        states,
    )
    parts = {
        "weights": states,
        "gradients": states,
        "optimizer": moments,
        "teacher": held,
        "gathered": gathered,
        "activations": own.kept,
        "transient": max(own_transient, their_transient),
        "logits": logits,
    }
    return Memory(parts, states + moments + held + gathered + together)


def moment_bytes(shape: Shape, states: str, muon: bool) -> float:
    """The bytes of the optimizer's moments, on the average of all parameters."""
    single = shape.matrices / shape.parameters if muon else 0.0
    return MOMENT_BYTES[states] * (1 - single / 2)


def logits_bytes(kind: str, sequences: int, work: LossWork, student: Shape, teacher: Shape | None) -> int:
    """The bytes that the chunked loss holds beside the head's gradient: a chunk of both models' logits; on CUDA a
    buffer of bf16 gradients and the head in bf16, on a CPU rows of scratch; the hidden states and their gradients."""
    tokens, vocabulary = sequences * work.length, student.vocabulary
    compute = 2 if kind == "cuda" else FP32
    chunks = loss_chunks(kind, tokens, vocabulary, work.chunk_tokens, compute)
    models = 1 if teacher is None else 2
    buffers = models * chunks.logits * vocabulary * FP32
    if kind == "cuda":
        buffers += chunks.gradients * (vocabulary * compute + student.hidden * FP32)
        buffers += student.hidden * vocabulary * compute  # the head in the dtype that it is multiplied in
    else:
        rows = max(1, min(chunks.logits, BLOCK_ELEMENTS[kind] // vocabulary))
        buffers += rows * vocabulary * FP32 * (models + work.cross_entropy + work.softcap)
    states = tokens * (student.hidden * (FP32 + compute) + (teacher.hidden * compute if teacher is not None else 0))
    if teacher is not None:
        states += work.compared * tokens * (teacher.hidden * compute + student.hidden * FP32)
    return buffers + states


def calibration_memory(sizes: Sizes, room: Room, kind: str, *, compared: bool) -> Memory:
    """The memory of scoring as `room` divides it: the weights of one part of the graph after the other, or all of them; the
    residual stream of the batches that wait on the device; one batch at its widest, or a weight as it is stored; what the
    scores accumulate, of which covariances are copied in the end."""
    batch = room.batch or 1
    count = -(-sizes.samples // batch)
    ahead = sizes.layer_stored if room.ahead else 0
    waiting = min(room.block or count, count)
    if compared:
        waiting = max(waiting, (room.lanes or count) * (sizes.layers + 1))
    stream = (waiting if room.streams == "device" else 1) * batch * sizes.stream
    # A covariance is taken of norm outputs, where a sample is not at its widest.
    transient = max(
        batch * sizes.sample + sizes.scores.adding, 2 * batch * sizes.stream + sizes.scores.covering, sizes.stored
    )
    logits = LOGIT_COPIES * batch * sizes.logits if compared else 0
    parts = (
        (sizes.embedding, sizes.stored + ahead),
        (sizes.layer, sizes.scores.grams + max(transient, sizes.scores.settling if kind == "cpu" else 0) + ahead),
        (sizes.head if compared else 0, max(logits, sizes.stored) if compared else 0),
    )
    if room.resident:
        parts = tuple((sizes.weights, beside) for _, beside in parts)  # type: ignore[assignment]
    weights = max(part for part, _ in parts)
    shown = {
        "weights": weights + ahead,
        "activations": stream,
        "transient": transient,
        "logits": logits,
        "scores": sizes.scores.kept + sizes.scores.grams,
    }
    return Memory(shown, max(sizes.scores.kept + stream + max(sum(part) for part in parts), sizes.scores.ending))
