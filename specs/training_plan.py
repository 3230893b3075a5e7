"""The models of training.yaml: all settings of training and evaluation, with every value written out.

The compiler builds a plan and writes it, people edit it, and the runtime reads nothing else. The blocks for optimizer,
loss, data and checkpoints are those of the spec language, so words and units mean the same in both files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from minitron.specs import training_consistency
from minitron.specs.blocks.base import (
    Block,
    Count,
    Listed,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SequenceLength,
    Text,
    wrong,
)
from minitron.specs.blocks.benchmarks import Listing
from minitron.specs.blocks.distill import CheckpointSettings, Layout, Loss, Recomputation, Shuffle, TeacherLogits
from minitron.specs.blocks.evaluate import Published
from minitron.specs.blocks.requirements import BoundText
from minitron.specs.blocks.teacher_correction import TeacherCorrection
from minitron.specs.blocks.training import Optimizer
from minitron.specs.data import DataSource
from minitron.specs.errors import Problem
from minitron.specs.float8 import Compute
from minitron.specs.tracking import TrackerName

FORMAT_VERSION = 1

DtypeName = Literal["float32", "bfloat16"]
ComputeName = Literal["float32", "bfloat16", "float8"]
WeightDtype = Literal["float32", "bfloat16", "float16"]


def _check_format(version: int) -> int:
    if version != FORMAT_VERSION:
        raise wrong(f"{{given}} is not the format that this version reads, {FORMAT_VERSION}", "compile again")
    return version


class HeadPlan(Block):
    """The computation of a model's logits from its hidden states: `z = scale * (h @ weight.T + bias)`, `softcap *
    tanh(z / softcap)`."""

    backbone: Text
    """Submodule whose last hidden state `h` is what the head reads."""

    module: Text
    """Submodule that holds the head."""

    weight: Text
    """Parameter [vocabulary, hidden]."""

    bias: Text | None
    """Parameter [vocabulary]; null: none."""

    scale: float
    """Factor of the logits."""

    softcap: PositiveFloat | None
    """Bound of the logits; null: none."""


class ModelPlan(Block):
    """One model: its folder and the computation of its logits."""

    model: Text
    """Folder in Hugging Face format, relative to training.yaml."""

    dtype: WeightDtype
    """Dtype of the weights. A student trains in the dtype `weights` and is saved in this one."""

    head: HeadPlan

    layers: Text | None = None
    """Submodule that lists the decoder layers, for `loss.hidden_states` and for spreading them; null: not known."""

    flops_per_token: PositiveInt | None = None
    """Floating-point operations of one token's forward at the plan's sequence length, for the utilisation that
    training reports; null: none is reported."""


class TeacherPlan(ModelPlan):
    """The teacher; a Hugging Face id may replace the folder."""

    revision: Text | None = None
    """Commit of a Hugging Face id."""

    compute: Compute = "bfloat16"
    """float8: the weights of the linear layers in decoder layers are held and multiplied in it, on a CPU by emulation."""


class ComputeDtype(Block):
    """The dtype of the student's forward and backward, by device; updates are computed in fp32. float8: that of the linear
    layers in decoder layers, what is around them in bf16 on CUDA; a CPU emulates it among fp32."""

    cpu: ComputeName
    cuda: ComputeName


class CorrectionPlan(TeacherCorrection):
    """The teacher correction; data, batch size and seed are those of the student's training."""

    every_tokens: Count
    """A checkpoint is written each time that this many tokens were trained on."""

    output: Text
    """Folder of the corrected teacher."""

    work: Text
    """Folder of its checkpoints and metrics."""


class CheckpointPlan(CheckpointSettings):
    """The checkpoint settings of the spec, with the interval always given."""

    every_tokens: Count


class LayoutPlan(Layout):
    """The layout of the spec, with the teacher's place always given."""

    teacher: Literal["sharded", "replicated"]


class HeldOutPlan(Block):
    """The text that is never trained on."""

    data: DataSource
    max_tokens: Count
    """At most this many tokens are read."""

    every_tokens: Count | None
    """Measured during training each time that this many tokens were trained on; null: only at the end."""


class EvaluatePlan(Block):
    """The measurements of `minitron eval`."""

    suite: Listed[Listing]
    """Benchmarks, each a task's name or with its shots and metric."""

    data_dir: Text | None
    """Folder with the tasks' data."""

    prompt: Text | None
    """The prompt that each model continues; null: the beginning of the held-out text."""

    continuation_tokens: PositiveInt

    require: dict[str, BoundText] = Field(default_factory=dict)
    """Bounds that the result must reach: a task or `held_out_loss` -> a bound."""

    published: Published | None = None
    """Scores that others have published for the same student."""


class EvaluationPlan(Block):
    """The plan of a build without distillation: enough to evaluate teacher and pruned student."""

    format_version: Annotated[int, AfterValidator(_check_format)]
    name: Text
    fingerprint: Text | None = None
    """Identifies the pruned student; training that began from another one is not continued."""

    teacher: TeacherPlan
    student: ModelPlan
    tokenizer: Text
    """Folder with the tokenizer."""

    output: Text
    """Folder of the final model."""

    work: Text
    """Folder of checkpoints, metrics and cached data."""

    held_out: HeldOutPlan | None
    evaluate: EvaluatePlan


class PhasePlan(Block):
    """One phase of the training. The schedule of the learning rate runs over all of them."""

    tokens: Count
    """To train on, rounded up to whole global batches."""

    sequence_length: SequenceLength
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    data: DataSource | None
    """null: that of the plan."""

    flops_per_token: PositiveInt | None = None
    """Floating-point operations of a step for one token, for the utilisation that training reports."""

    @property
    def step_tokens(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.step_tokens)


class StartPlan(Block):
    """The state that a training goes on from: the student as a search left it after its last rung. Up to there the learning
    rate stayed at its highest after the warm-up; what is left of the training lowers it."""

    checkpoints: Text
    """Folder of the checkpoints, relative to training.yaml."""

    step: PositiveInt
    """The step that the training goes on after."""


class TrainingPlan(EvaluationPlan):
    """The whole training.yaml."""

    data: DataSource
    teacher_correction: CorrectionPlan | None = None
    """null: the teacher stays as it is."""

    teacher_logits: TeacherLogits
    tokens: Count
    """To train on, rounded up to whole global batches."""

    sequence_length: SequenceLength
    global_batch_size: PositiveInt
    """Sequences in an optimizer step, over all ranks and accumulation steps."""

    micro_batch_size: PositiveInt
    """The most sequences in one forward; each rank takes the largest divisor of its share of the global batch."""

    phases: Listed[PhasePlan] = ()
    """Stretches of the training with lengths, batches and data of their own; those above are then the ones of the held-out
    text and of the teacher's correction."""

    start: StartPlan | None = None
    """null: the training begins with the pruned student."""

    optimizer: Optimizer
    weights: DtypeName = "float32"
    """The dtype of the student's weights and gradients while it trains; bfloat16 is rounded at random."""

    loss: Loss
    kept_coordinates: Text | None = None
    """File with what the student keeps of the teacher's hidden states, for `coordinates: kept`: a tensor `index` [width], the
    channels, or `matrix` [teacher's width, width], the components; null: all is kept."""

    track: Listed[TrackerName] | None = None
    """The trackers that metrics go to beside metrics.jsonl; null: TensorBoard where it is installed."""

    seed: NonNegativeInt
    shuffle: Shuffle = "all"
    """The order of the sequences: all of them shuffled, or within blocks of `block` tokens, one block after the other."""

    compute_dtype: ComputeDtype
    gradient_checkpointing: Recomputation
    """The activations that the backward pass computes again: of layers (true), of their attention, or none (false)."""

    compile: bool
    """The layers of student and teacher go through torch.compile."""

    layout: LayoutPlan
    checkpoint: CheckpointPlan

    @property
    def course(self) -> tuple[PhasePlan, ...]:
        """The phases, or the one that the training consists of."""
        if self.phases:
            return self.phases
        student, teacher = self.student.flops_per_token, self.teacher.flops_per_token
        beside = needs_teacher(self)
        known = student is not None and (teacher is not None or not beside)
        return (
            PhasePlan(
                tokens=self.tokens,
                sequence_length=self.sequence_length,
                global_batch_size=self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                data=None,
                flops_per_token=step_flops(student or 0, teacher or 0 if beside else 0) if known else None,
            ),
        )

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.course)

    @property
    def trained_tokens(self) -> int:
        """The tokens of all steps."""
        return sum(phase.steps * phase.step_tokens for phase in self.course)


def step_flops(student: int, teacher: int) -> int:
    """Returns the FLOPs of a step for one token: the student's forward pass, its backward pass, which takes twice as much,
    and the teacher's forward pass."""
    return 3 * student + teacher


def needs_teacher(plan: TrainingPlan) -> bool:
    """Checks whether a term of the loss is computed from the teacher itself."""
    return plan.loss.reads_teacher(plan.teacher_logits)


TRAINING_KEYS = frozenset(TrainingPlan.model_fields) - frozenset(EvaluationPlan.model_fields)

_MOST_SEQUENCES = 1 << 16  # in a forward; beyond that nothing is gained, and the search for a divisor stays short


def divisor_within(share: int, most: int) -> int:
    """Returns the largest divisor of a device's `share` of the global batch that is no more than `most`."""
    return max(size for size in range(1, min(share, most, _MOST_SEQUENCES) + 1) if share % size == 0)


def deciding_settings(plan: TrainingPlan) -> dict[str, Any]:
    """Returns the settings that a training cannot change once it has begun, flat: dotted key -> value.

    The settings are those that decide which samples come, what is learnt from them and how the learning rate runs. Left
    out are settings that decide how often something is measured or saved, how the same sums are cut into pieces (micro
    batches, chunks, recomputation, layout) and how they are computed (compute_dtype, compile), so that a run can move
    to another machine.
    """
    whole = plan.model_dump(mode="json")
    kept = {key: whole[key] for key in _DECIDING}
    kept["student"] = {"head": whole["student"]["head"]}
    kept["teacher"] = {key: whole["teacher"][key] for key in ("revision", "dtype", "head")}
    if plan.teacher.compute != UNSAID["teacher.compute"]:
        kept["teacher"]["compute"] = plan.teacher.compute
    kept["loss"].pop("chunk_tokens")
    kept["teacher_correction"] = None
    if plan.teacher_correction is not None:
        kept["teacher_correction"] = {key: whole["teacher_correction"][key] for key in ("tokens", "optimizer")}
    for number, phase in enumerate(whole["phases"]):  # none: as trainings were before they had any
        kept[f"phases.{number}"] = {key: phase[key] for key in ("tokens", "sequence_length", "global_batch_size")}
    order = {} if plan.shuffle == UNSAID["shuffle"] else {"shuffle": whole["shuffle"]}
    return dict(_flat("", kept)) | order


UNSAID = {"shuffle": "all", "teacher.compute": "bfloat16"}
"""The settings that `deciding_settings` leaves out at these values, which all trainings had before they could choose."""

_DECIDING = (
    "start",
    "fingerprint",
    "teacher_logits",
    "tokens",
    "sequence_length",
    "global_batch_size",
    "optimizer",
    "weights",
    "loss",
    "seed",
)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}".lstrip("."), inner)
    else:
        yield prefix, value


def to_document(plan: EvaluationPlan) -> dict[str, Any]:
    """Returns the plan as training.yaml holds it, with the measurements last."""
    document = plan.model_dump(mode="json")
    return document | {key: document.pop(key) for key in ("held_out", "evaluate")}


def problems(plan: TrainingPlan) -> Iterator[Problem]:
    """Yields problems of values that are valid alone and contradict one another."""
    yield from training_consistency.rate_falls(plan.optimizer, "optimizer")
    if plan.teacher_correction is not None:
        yield from training_consistency.rate_falls(plan.teacher_correction.optimizer, "teacher_correction.optimizer")
    yield from training_consistency.loss_is_whole(plan.loss, "loss")
    yield from training_consistency.pairs_differ(plan.loss, "loss")
    yield from training_consistency.samples_are_enough(plan.loss, plan.teacher_logits, "loss")
    yield from training_consistency.phases_have_a_teacher(plan.phases, plan.teacher_logits, "phases")
    yield from training_consistency.phases_make_up_the_training(plan.phases, plan.tokens, "phases")
    lengths = [plan.sequence_length, *(phase.sequence_length for phase in plan.phases)]
    yield from training_consistency.blocks_hold_sequences(plan.shuffle, lengths, "shuffle")
    yield from training_consistency.offloading_needs_sharding(plan.layout, "layout")
    yield from training_consistency.offloading_is_of_plain_adamw(plan.layout, plan.weights, plan.optimizer, "layout")
