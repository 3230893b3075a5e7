"""The phases of a plan: what is done, in order, with its tokens, FLOPs, memory, time and disk.

FLOPs count the matrix products, two for a multiplication and an addition: of a token 2 N in a forward and 4 N in a
backward, N the weights that it meets; attention over the positions before it, on average half a sequence; and 2 N of the
student's layers once more where activations are recomputed. What elementwise operations add is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from minitron.compiler.estimate import model_costs as costs
from minitron.compiler.estimate.activations import Footprint, Work, footprint
from minitron.compiler.estimate.choice import MACHINES, WAYS, Choice, choose, micro_batches
from minitron.compiler.estimate.devices import DEVICES, Cluster, Device
from minitron.compiler.estimate.float8 import NO_LINEARS
from minitron.compiler.estimate.hardware import DISTILL, HardwareAssumptions
from minitron.compiler.estimate.memory import (
    FP32,
    GATHERED_LAYERS,
    HELD_BY_MODULES,
    Layout,
    LossWork,
    Memory,
    Running,
    Shape,
    calibration_memory,
    moment_bytes,
    shape_of,
    training_memory,
)
from minitron.compiler.estimate.phases import Phase
from minitron.compiler.estimate.plan_costs import plan_costs
from minitron.compiler.estimate.recovery_phases import merge_phase, refit_phase
from minitron.compiler.estimate.search_phase import SharedPass, search_phase
from minitron.compiler.estimate.training_defaults import micro_batch, place_teacher
from minitron.compiler.importance.accumulated import accumulated
from minitron.compiler.importance.room import Sizes, divide
from minitron.compiler.plan.plan import Plan
from minitron.specs.attention_modules import attention_of
from minitron.specs.blocks.distill import Distill, Recomputation
from minitron.specs.blocks.training import Optimizer
from minitron.specs.training_plan import divisor_within

CHUNK_ELEMENTS = 1 << 23  # logits that `minitron capture` holds at a time
CONTEXT = 4096  # tokens before the one that is decoded, where no phase of the spec says how long sequences are
MASKS = 4  # of one byte for each pair of positions, while the mask of a batch is made
GUESSED_BYTES = 34  # a token, channel and layer, where a model cannot be run without data (arXiv 2205.05198, section 4)


@dataclass(frozen=True)
class Estimate:
    """FLOPs, memory and time of each phase of a plan. Models are run without data at most once each, whatever is asked."""

    plan: Plan
    _ran: dict[tuple[str, Work], Footprint] = field(default_factory=dict)

    # -- costs of the models alone ------------------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> tuple[costs.ModelCosts, costs.ModelCosts]:
        return plan_costs(self.plan)

    @property
    def teacher_costs(self) -> costs.ModelCosts:
        return self._costs[0]

    @property
    def student_costs(self) -> costs.ModelCosts:
        return self._costs[1]

    # -- models -------------------------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Shape:
        captured = self.plan.teacher.captured
        head, config = self.plan.teacher.head.weight, captured.config.to_dict()
        return shape_of(captured.model, captured.layer_path, head, config)

    @cached_property
    def student(self) -> Shape:
        captured, head = self.plan.teacher.captured, self.plan.teacher.head.weight
        return shape_of(self.plan.model, captured.layer_path, head, self.plan.config.to_dict())

    def footprint(self, side: str, work: Work) -> Footprint:
        """Returns the footprint of one sequence; a batch of n sequences takes n times as much."""
        plan = self.plan
        if (side, work) not in self._ran:
            config, model = (plan.teacher.captured.config, plan.teacher.captured.model)
            count = plan.teacher.captured.layer_count
            if side == "student":
                config, model, count = plan.config, plan.model, plan.targets.layers
            try:
                found = footprint(
                    config,
                    plan.teacher.captured.attention,
                    plan.teacher.head.backbone,
                    plan.teacher.captured.layer_path,
                    count,
                    work,
                )
            except Exception:  # a modelling file may want to see data: then by the rule of thumb
                hidden = model.get_parameter(plan.teacher.head.weight).shape[1]
                guess = GUESSED_BYTES * hidden * work.length * work.sequences
                found = Footprint(guess * count if work.training else 0, guess)
            self._ran[side, work] = found
        return self._ran[side, work]

    # -- training -----------------------------------------------------------------------------------------------------

    def layout(self, devices: int) -> Layout:
        """The layout that training.yaml gives on `devices` devices."""
        return self._layout(devices, Choice(self.recomputation, self.micro_batch))

    def _layout(self, devices: int, choice: Choice) -> Layout:
        distill = self.distill
        share = max(1, distill.batch // devices)
        micro = divisor_within(share, choice.micro_batch)
        return Layout(
            devices,
            micro,
            share // micro,
            *self.sharding(),
            recompute=choice.recompute,
            offload=distill.layout.cpu_offload,
            bf16_weights=distill.weights == "bfloat16",
            moments=distill.adamw.states,
            float8_student=distill.compute == "float8",
            float8_teacher=self.plan.loaded.spec.teacher.compute == "float8",
            compiled=distill.compile,
            muon=distill.adamw.name == "muon",
        )

    @cached_property
    def recomputation(self) -> Recomputation:
        """The recomputation in the backward pass: as the spec has it, else the least with which every phase fits."""
        given = self.distill.gradient_checkpointing
        if given is not None:
            return given
        return max((one._choice.recompute for _, one in self._alone(None)), key=WAYS.index)

    @cached_property
    def micro_batch(self) -> int:
        """The most sequences in one forward: as the spec has it, else as many as fit."""
        return self.distill.micro_batch_size or self._choice.micro_batch

    @property
    def micro_batches(self) -> list[int]:
        """The micro batch of the training as a whole, and those of its phases."""
        own = [one.micro_batch for _, one in self.stretches()] if self.distill.phases else []
        return [self.micro_batch, *own]

    @cached_property
    def _choice(self) -> Choice:
        return self._choose(lambda layout: self.training("cuda", layout).peak)

    @cached_property
    def candidate(self) -> Choice:
        """The choice for the candidates of a search, of which this student is the largest: one device holds the whole teacher,
        and of each candidate the trunk and the branch that judges it."""

        def peak(layout: Layout) -> int:
            return (alone := self.training("cuda", layout)).peak + alone.states

        return self._choose(peak, machines=(1,))

    def _choose(self, peak: Callable[[Layout], int], machines: Sequence[int] = MACHINES) -> Choice:
        distill, length = self.distill, self.distill.sequence_length
        given, most = distill.gradient_checkpointing, distill.micro_batch_size
        sizes = [most] if most else list(micro_batches(distill.batch, length, micro_batch(distill.batch, length)))
        ways = WAYS if given is None else (given,)
        return choose(ways, sizes, self._layout, peak, self._least_memory, machines)

    def _least_memory(self, layout: Layout) -> int:
        """Weights, gradients, moments and teacher, without running a model: what a training needs at least."""
        beside = None if self.sampled else Running(self.teacher, Footprint(0, 0))
        work = LossWork(self.distill.sequence_length, 1, False, False)
        return training_memory("cuda", layout, Running(self.student, Footprint(0, 0)), beside, self._element, work).peak

    def sharding(self) -> tuple[bool, bool]:
        """Returns whether student and teacher are sharded where several devices train, as training.yaml has it."""
        layout = self.distill.layout
        teacher = layout.teacher or place_teacher(self.teacher_costs.weight_bytes)
        return layout.student == "sharded", teacher == "sharded"

    @property
    def kept_checkpoints(self) -> int:
        """The number of a training's checkpoints that stay on the disk."""
        return self.distill.checkpoint.keep_last + self.distill.checkpoint.keep_best

    @property
    def distill(self) -> Distill:
        distill = self.plan.loaded.spec.distill
        assert distill is not None, "there is no training without it"
        return distill

    def training(self, kind: str, layout: Layout, *, correction: bool = False) -> Memory:
        """The memory of distillation, or of the correction of the teacher, on one device of `kind` cpu or cuda."""
        distill, sampled = self.distill, self.sampled
        learner = self.teacher if correction else self.student
        # Weights in fp32 are cast for every product, and the casts live until the backward has used them; where float8 computes
        # all products, there are no casts.
        narrow = layout.shards_student or layout.bf16_weights or (layout.float8_student and learner.float8.all)
        own = Work(
            1,
            distill.sequence_length,
            torch.bfloat16 if narrow and kind == "cuda" else torch.float32,
            autocast=kind == "cuda",
            training=True,
            recompute=layout.recompute,
        )
        work = LossWork(
            distill.sequence_length,
            distill.loss.chunk_tokens,
            bool(distill.loss.cross_entropy) or correction,
            self.plan.teacher.head.softcap is not None,
            0 if correction else self.compared_states,
        )
        beside = not (correction or sampled)
        theirs = Work(1, distill.sequence_length, self.plan.dtype if kind == "cuda" else torch.float32)
        return training_memory(
            kind,
            layout,
            Running(
                learner,
                self.footprint("teacher" if correction else "student", own).times(layout.micro_batch),
            ),
            Running(self.teacher, self.footprint("teacher", theirs).times(layout.micro_batch)) if beside else None,
            self._element,
            work,
        )

    @property
    def sampled(self) -> bool:
        """Checks whether the teacher's logits are stored, so that no teacher runs beside the student."""
        return not isinstance(self.distill.teacher_logits, str)

    @property
    def compared_states(self) -> int:
        """The number of hidden states of each model that the loss compares."""
        hidden = self.distill.loss.hidden_states
        if hidden is None or hidden.weight == 0:
            return 0
        layers = {"last:last": 1, "all": self.plan.targets.layers}
        pairs = layers[hidden.pairs] if isinstance(hidden.pairs, str) else len(hidden.pairs)
        return pairs + hidden.embedding

    @property
    def _element(self) -> int:
        return self.plan.dtype.itemsize

    def student_flops(self) -> int:
        """Forward and backward of one token, and what is recomputed."""
        length = self.distill.sequence_length
        forward = self.student_costs.forward_flops_per_token(length)
        if self.recomputation is True:
            return 4 * forward - 2 * self.student.hidden * self.student.vocabulary
        if self.recomputation == "attention":
            pairs = (length // 2) * self.student_costs.attention_flops_per_pair
            layers = self.plan.model.get_submodule(self.plan.teacher.captured.layer_path).children()
            modules = [module for layer in layers for module in attention_of(layer)]
            weights: int = sum(one.numel() for module in modules for one in module.parameters())
            return 3 * forward + pairs + 2 * weights
        return 3 * forward

    def float8_flops(self, *, correction: bool = False) -> int:
        """The FLOPs of one token of distillation, or of the teacher's correction, that are of products in float8."""
        learner = self.teacher if correction else self.student
        flops, passes = 0, 4 if self.recomputation is True else 3
        if self.distill.compute == "float8":
            flops += 2 * passes * learner.float8.weights
        if self.plan.loaded.spec.teacher.compute == "float8" and not (correction or self.sampled):
            flops += 2 * self.teacher.float8.weights
        return flops

    def token_flops(self) -> int:
        """The FLOPs of one token of distillation."""
        teacher = 0 if self.sampled else self.teacher_costs.forward_flops_per_token(self.distill.sequence_length)
        return teacher + self.student_flops()

    # -- phases -------------------------------------------------------------------------------------------------------

    def phases(self, hardware: HardwareAssumptions) -> list[Phase]:
        """The phases in the order in which they run."""
        spec, plan = self.plan.loaded.spec, self.plan
        kind = hardware.cluster.device.kind
        phases = []
        if spec.importance.data is not None and plan.needs_scores:
            phases.append(self._calibrate(hardware))
            phases += self._recovery(kind)
        if spec.distill is None:
            return phases
        layout, length = self.layout(hardware.cluster.count), spec.distill.sequence_length
        forward = self.teacher_costs.forward_flops_per_token(length)
        if spec.teacher_correction is not None:
            tokens = spec.distill.whole_steps(spec.teacher_correction.tokens)
            own = spec.teacher_correction.optimizer
            corrected = replace(layout, moments=own.states, muon=own.name == "muon")
            memory = self.training(kind, corrected, correction=True)
            does = f"fine-tunes the teacher on the data that it will teach with: {self._steps(tokens)}"
            disk = self._checkpoints(self.teacher, own)
            float8 = tokens * self.float8_flops(correction=True)
            phases.append(Phase("teacher_correction", does, tokens, tokens * 3 * forward, memory, disk, float8))
        if plan.search is not None and plan.search["rungs"]:
            phases.append(self._search(hardware.cluster.device, plan.search["rungs"]))
        tokens = spec.distill.trained_tokens
        if not isinstance(spec.distill.teacher_logits, str):
            draws = spec.distill.teacher_logits.sampled
            disk = costs.sampled_logits_bytes(tokens, draws, self.teacher.vocabulary)
            does = f"stores {draws} samples of the teacher's distribution for each token"
            float8 = 2 * tokens * self.teacher.float8.weights if layout.float8_teacher else 0
            phases.append(Phase("capture", does, tokens, tokens * forward, self._capturing(kind, layout), disk, float8))
        disk = self._checkpoints(self.student, self.distill.adamw) + self.student_costs.weight_bytes
        source = "stored samples of the teacher" if self.sampled else "the teacher, which runs beside it"
        stretches = list(self.stretches())
        for name, one in stretches:
            tokens = one.distill.trained_tokens
            does = f"trains the student from {source}: {one._steps(tokens)}"
            memory = one.training(kind, one.layout(hardware.cluster.count))
            kept = disk if name == stretches[-1][0] else 0  # one training: its checkpoints stand once on the disk
            flops, float8 = tokens * one.token_flops(), tokens * one.float8_flops()
            phases.append(Phase(name, does, tokens, flops, memory, kept, float8))
        return phases

    def stretches(self) -> Iterator[tuple[str, Estimate]]:
        """Yields the name and the estimate of each phase of the distillation, as if it were the whole of it."""
        yield from self._alone(self.recomputation) if self.distill.phases else [(DISTILL, self)]

    def _alone(self, recompute: Recomputation | None) -> Iterator[tuple[str, Estimate]]:
        """Yields the estimate of each phase alone, with this recomputation; None leaves it open."""
        if not self.distill.phases:
            yield DISTILL, self
        for number, phase in enumerate(self.distill.phases):
            loaded = self.plan.loaded
            distill = self.distill.alone(phase).model_copy(update={"gradient_checkpointing": recompute})
            spec = loaded.spec.model_copy(update={"distill": distill})
            yield f"{DISTILL}_{number + 1}", replace(self, plan=replace(self.plan, loaded=replace(loaded, spec=spec)))

    def _search(self, device: Device, rungs: Sequence[Mapping[str, int]]) -> Phase:
        """The phase of a search, counted as if all candidates were as large as this plan's student."""
        length, layout = self.distill.sequence_length, self._layout(1, self.candidate)
        shared = SharedPass(
            self.training(device.kind, layout),
            self.teacher_costs.forward_flops_per_token(length),
            self.student_flops(),
            layout.micro_batch * length * self.teacher.vocabulary,
        )
        return search_phase(device, rungs, shared)

    def _steps(self, tokens: int) -> str:
        batch, length = self.distill.batch, self.distill.sequence_length
        return f"{tokens // (batch * length)} steps of {batch} sequences of {length} tokens"

    def devices(self, hardware: HardwareAssumptions) -> list[dict[str, Any]]:
        """The totals of all phases on the same number of devices of each kind as `hardware` has."""
        phases = self.phases(hardware)
        whole = Phase(
            "all", "", 0, sum(phase.flops for phase in phases), Memory({}, 0),
            float8=sum(phase.float8 for phase in phases), waiting=sum(phase.waiting for phase in phases),
        )  # fmt: skip
        named = hardware.cluster.device
        kinds = [*DEVICES.values(), *([] if named.name in DEVICES else [named])]
        found = []
        for device in kinds:
            there = replace(hardware, cluster=Cluster(device, hardware.cluster.count))
            found.append(
                {
                    "device": there.cluster.name,
                    "memory_bytes": device.memory_bytes,
                    "device_hours": round(whole.hours(there), 6),
                    "days": round(whole.seconds(there) / 86400, 6),
                }
            )
        return found

    def _calibrate(self, hardware: HardwareAssumptions) -> Phase:
        """The phase that scores the teacher. It needs no logits, unless layers are ranked by the harm of dropping
        each."""
        data = self.plan.loaded.spec.importance.data
        assert data is not None
        plan, captured = self.plan, self.plan.teacher.captured
        teacher, length = self.teacher_costs, data.sequence_length
        tokens, device = data.samples * length, hardware.cluster.device
        whole = teacher.forward_flops_per_token(length)
        each = whole - 2 * self.teacher.hidden * self.teacher.vocabulary
        if plan.rotation is not None and plan.covers:  # the covariance of what norms yield
            each += 2 * self.teacher.hidden**2 * len(plan.rotation.sites)
        compared = self._compares_logits
        if compared:  # each layer that is left out shares what lies before it
            each += (captured.layer_count + 1) * (whole + each) // 2
        one_by_one = plan.layers_one_by_one
        metric = plan.loaded.spec.importance.depth.metric
        each += sum(captured.layer_count - gone + (metric == "logit_mse") for gone in range(one_by_one)) * whole
        dtype = plan.dtype if device.kind == "cuda" else torch.float32
        sizes = self.calibration_sizes(data.samples, length, dtype)
        greedy = plan.loaded.spec.importance.selection == "greedy"
        room = divide(device.memory_bytes, sizes, device.kind, compared=compared, whole=greedy)
        memory = calibration_memory(sizes, room, device.kind, compared=compared)
        does = f"scores every axis by the activations of {data.samples} samples of {length} tokens, layer by layer"
        if compared:
            does += ", and every layer by the harm of dropping it"
        if one_by_one:
            does += f", and drops {one_by_one} layers one after the other"
        return Phase("calibrate", does, tokens, tokens * each, memory)

    @property
    def _compares_logits(self) -> bool:
        at_once = self.plan.rank_layers and not self.plan.layers_one_by_one
        return at_once and self.plan.loaded.spec.importance.depth.metric != "block_influence"

    def calibration_sizes(self, samples: int, length: int, dtype: torch.dtype) -> Sizes:
        """The sizes that decide the memory of scoring `samples` of `length` tokens in `dtype`."""
        plan, captured, element = self.plan, self.plan.teacher.captured, dtype.itemsize
        embedding = captured.model.get_parameter(costs.embedding_name(captured)).numel()
        tied = costs.embedding_name(captured) == plan.teacher.head.weight
        head = self.teacher.vocabulary * self.teacher.hidden
        in_layers = [
            one.numel() for name, one in captured.model.named_parameters() if captured.layer_in_path(name) is not None
        ]
        counts = costs.attention_counts(captured, plan.teacher.roles, plan.teacher.table).values()
        attention = max(((one.heads + one.groups) * (one.key_width + one.value_width) for one in counts), default=0)
        stream = length * self.teacher.hidden * element
        inside = self.footprint("teacher", Work(1, length, dtype)).transient - HELD_BY_MODULES * stream
        kept = embedding if tied else 0
        return Sizes(
            weights=self.teacher.parameters * element,
            embedding=embedding * element,
            layer=(kept + self.teacher.layer) * element,
            head=max(kept, head) * element,
            stored=max(in_layers) * self._element if element != self._element else 0,
            layer_stored=self.teacher.layer * self._element,
            sample=max(inside, attention * length * element, MASKS * length * length),
            stream=stream,
            logits=length * self.teacher.vocabulary * element,
            samples=samples,
            length=length,
            layers=captured.layer_count,
            scores=accumulated(plan.teacher, plan.taken),
        )

    def _recovery(self, kind: str) -> Iterator[Phase]:
        """The phases that change weights before they are cut, in order."""
        plan, data = self.plan, self.plan.loaded.spec.importance.data
        if plan.merges_experts:
            yield merge_phase(plan)
        if plan.refits and data is not None:
            both = self.teacher_costs.flops_per_token + self.student_costs.flops_per_token
            sizes = self.calibration_sizes(data.samples, data.sequence_length, torch.float32)
            yield refit_phase(plan, (self.teacher, self.student), both, sizes, kind)

    def _capturing(self, kind: str, layout: Layout) -> Memory:
        """The memory of storing the teacher's samples: the teacher, a micro batch in it, a chunk of logits and of
        probabilities, and these in fp64 with their sums."""
        element = self._element if kind == "cuda" else FP32
        linears = self.teacher.float8 if layout.float8_teacher else NO_LINEARS
        held, gathered = linears.held(self.teacher.parameters, element), 0
        if layout.shards_teacher:
            held = -(-held // layout.devices)
            gathered = (self.teacher.outside + GATHERED_LAYERS * self.teacher.layer) * element
        work = Work(1, self.distill.sequence_length, self.plan.dtype if kind == "cuda" else torch.float32)
        parts = {
            "teacher": held,
            "gathered": gathered,
            "transient": self.footprint("teacher", work).times(layout.micro_batch).transient
            + linears.beside(layout.micro_batch * work.length, kind, training=False, compiled=layout.compiled),
            "logits": CHUNK_ELEMENTS * 2 * (FP32 + 8),
        }
        return Memory(parts, sum(parts.values()))

    def _checkpoints(self, shape: Shape, optimizer: Optimizer) -> int:
        """Weights in fp32 and moments, as many times as checkpoints are kept, and one that is being written."""
        each = FP32 + moment_bytes(shape, optimizer.states, optimizer.name == "muon")
        return math.ceil(each * shape.parameters) * (self.kept_checkpoints + 1)
