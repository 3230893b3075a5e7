"""training.yaml: everything that training and evaluation are told, with every value written out.

The compiler writes it, people edit it, the runtime reads it and nothing else. Its blocks for optimizer, loss, data and
checkpoints are those of the spec language, so words and units mean the same in both files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from minitron.specs import source
from minitron.specs.blocks.base import Block, Count, Listed, NonNegativeInt, PositiveFloat, PositiveInt, Text, wrong
from minitron.specs.blocks.distill import Checkpoint, Layout, Loss, TeacherLogits
from minitron.specs.blocks.teacher_correction import TeacherCorrection
from minitron.specs.blocks.training import Optimizer
from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve
from minitron.specs.errors import SpecError, SpecInvalid, UsageError
from minitron.specs.shape import from_dotted
from minitron.specs.translate import locate, translate

FILE = "training.yaml"
FORMAT_VERSION = 1

DtypeName = Literal["float32", "bfloat16"]


def _check_format(version: int) -> int:
    if version != FORMAT_VERSION:
        raise wrong(f"{{given}} is not the format that this version reads, {FORMAT_VERSION}", "compile again")
    return version


class HeadPlan(Block):
    """How a model's logits come from its hidden states: `z = scale * (h @ weight.T + bias)`, `softcap * tanh(z /
    softcap)`."""

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
    """One model: where it is and how its logits are computed."""

    model: Text
    """Folder in Hugging Face format, relative to training.yaml."""

    dtype: DtypeName
    """Number format of the weights. A student trains in float32 and is saved in this one."""

    head: HeadPlan

    layers: Text | None = None
    """Submodule that lists the decoder layers, for `loss.hidden_states` and for spreading them; null: not known."""

    flops_per_token: PositiveInt | None = None
    """Floating-point operations of one token's forward at the plan's sequence length, for the utilisation that
    training reports; null: none is reported."""


class TeacherPlan(ModelPlan):
    """The teacher; a Hugging Face id may stand for the folder."""

    revision: Text | None = None
    """Commit of a Hugging Face id."""


class ComputeDtype(Block):
    """What the student's forward and backward compute in, by device; its weights and their updates are fp32."""

    cpu: DtypeName
    cuda: DtypeName


class CorrectionPlan(TeacherCorrection):
    """The teacher's own training before it teaches; data, batch and seed are those of the student's."""

    every_tokens: Count
    """A checkpoint each so many tokens."""

    output: Text
    """Folder of the corrected teacher."""

    work: Text
    """Folder of its checkpoints and metrics."""


class CheckpointPlan(Checkpoint):
    """As in the spec, with the interval always given."""

    every_tokens: Count


class LayoutPlan(Layout):
    """As in the spec, with the teacher's place always given."""

    teacher: Literal["sharded", "replicated"]


class HeldOutPlan(Block):
    """Text that is never trained on."""

    data: DataSource
    max_tokens: Count
    """At most this many tokens are read."""

    every_tokens: Count | None
    """Measured during training each so many tokens; null: only at the end."""


class EvaluatePlan(Block):
    """What `minitron eval` does."""

    suite: Listed[Text]
    """Tasks of lm-eval."""

    data_dir: Text | None
    """Folder with the tasks' data."""

    prompt: Text | None
    """What each model continues; null: the beginning of the held-out text."""

    continuation_tokens: PositiveInt


class EvaluationPlan(Block):
    """A build without distillation: enough to evaluate teacher and pruned student."""

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


class TrainingPlan(EvaluationPlan):
    """The whole training.yaml."""

    data: DataSource
    teacher_correction: CorrectionPlan | None = None
    """null: the teacher stays as it is."""

    teacher_logits: TeacherLogits
    tokens: Count
    """To train on, rounded up to whole global batches."""

    sequence_length: Annotated[int, Field(ge=2, le=2**31)]
    global_batch_size: PositiveInt
    """Sequences in an optimizer step, over all ranks and accumulation steps."""

    micro_batch_size: PositiveInt
    """Sequences in one forward."""

    optimizer: Optimizer
    loss: Loss
    seed: NonNegativeInt
    compute_dtype: ComputeDtype
    gradient_checkpointing: bool
    compile: bool
    """The student's layers go through torch.compile."""

    layout: LayoutPlan
    checkpoint: CheckpointPlan

    @property
    def step_tokens(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.step_tokens)


@dataclass(frozen=True)
class LoadedPlan:
    """A valid training.yaml and where each of its values stands."""

    plan: EvaluationPlan
    path: Path
    tree: source.Node = field(repr=False)
    places: Mapping[str, str] = field(default_factory=dict)
    """First keys of `plan` that stand elsewhere in the file, for a plan that was made from another one."""

    @property
    def folder(self) -> Path:
        """What relative paths in the plan are relative to."""
        return self.path.parent

    def error(self, path: str, message: str, hint: str = "") -> SpecError:
        """An error at the place of the dotted `path`."""
        first, dot, rest = path.partition(".")
        path = self.places.get(first, first) + dot + rest
        return locate(self.tree, from_dotted(path))[0].error(path, message, hint)

    def invalid(self, path: str, message: str, hint: str = "") -> SpecInvalid:
        return SpecInvalid([self.error(path, message, hint)])

    def training(self) -> TrainingPlan:
        """The plan of a build that trains. UsageError where there is nothing to train."""
        if not isinstance(self.plan, TrainingPlan):
            raise UsageError(
                f"{self.path} says nothing about training: the build was compiled from a spec without `distill`; "
                "add that block to the spec and compile again"
            )
        return self.plan

    def data(self, at: str, data: DataSource) -> DataSource:
        """The source that stands at `at`, its files found. SpecInvalid for files that are not there."""
        return resolve(data, self.folder, at=at, error=self.error)


_TRAINING_KEYS = set(TrainingPlan.model_fields) - set(EvaluationPlan.model_fields)


def read_plan(build: Path) -> LoadedPlan:
    """Reads BUILD/training.yaml. UsageError where it is not there, SpecInvalid with everything that is wrong in it."""
    path = build / FILE
    if not build.is_dir():
        raise UsageError(f"{build}: there is no such build folder; `minitron compile SPEC -o {build}` makes one")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{build} has no {FILE}; `minitron compile SPEC -o {build}` writes it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    tree, errors = source.read_bytes(content, str(path))
    if errors:
        raise SpecInvalid(errors)
    values = source.plain(tree)
    if not isinstance(values, dict):
        raise SpecInvalid([tree.place.error("", "is not a mapping", "write `key: value` lines, or compile again")])
    kind = TrainingPlan if _TRAINING_KEYS & values.keys() else EvaluationPlan
    try:
        plan = kind.model_validate(values)
    except ValidationError as error:
        found = translate(error.errors(include_url=False), tree, kind)
        raise SpecInvalid([one.error for one in found if one.error is not None]) from None
    loaded = LoadedPlan(plan, path.absolute(), tree)
    if isinstance(plan, TrainingPlan) and (wrong := [loaded.error(*problem) for problem in _contradictions(plan)]):
        raise SpecInvalid(wrong)
    return loaded


Problem = tuple[str, str, str]


def _contradictions(plan: TrainingPlan) -> Iterator[Problem]:
    """What each value allows and all together do not; and what this version cannot do yet."""
    micro, whole, optimizer, loss = plan.micro_batch_size, plan.global_batch_size, plan.optimizer, plan.loss
    if whole % micro:
        yield "micro_batch_size", f"{micro} does not divide global_batch_size, {whole}", f"write a divisor of {whole}"
    optimizers = {"optimizer": optimizer}
    if plan.teacher_correction is not None:
        optimizers["teacher_correction.optimizer"] = plan.teacher_correction.optimizer
    for at, one in optimizers.items():
        if one.min_lr > one.lr:
            yield f"{at}.min_lr", f"{one.min_lr:g} is higher than lr, {one.lr:g}", f"write at most {one.lr:g}"
    hidden = loss.hidden_states is not None and loss.hidden_states.weight != 0
    if loss.logits.weight == 0 and loss.cross_entropy == 0 and not hidden:
        yield (
            "loss",
            "every term has weight 0: there is nothing to learn",
            "give `logits.weight` or `cross_entropy` a weight",
        )
    if plan.layout.cpu_offload and plan.layout.student != "sharded":
        yield (
            "layout.cpu_offload",
            "a student that is replicated stays on its device",
            "write `student: sharded`, also for one device",
        )
    if plan.teacher_logits != "online":
        if loss.logits.divergence != "forward_kl":
            message = (
                f"{loss.logits.divergence} needs the teacher's whole distribution, and `teacher_logits` are samples"
            )
            yield "loss.logits.divergence", message, "write forward_kl, or `teacher_logits: online`"
        if loss.hidden_states is not None:
            message = "hidden states need the teacher itself, and `teacher_logits` are samples"
            yield "loss.hidden_states", message, "write null, or `teacher_logits: online`"
    if loss.hidden_states is not None and loss.hidden_states.weight == "dynamic" and not loss.logits.weight:
        message = "`dynamic` is scaled to the logit loss, whose weight is 0"
        yield "loss.hidden_states.weight", message, "write a number, or give `logits` a weight"


def resume_identity(plan: TrainingPlan, data_hash: str) -> dict[str, Any]:
    """What a training run cannot change on the way, flat: dotted key -> value.

    Whatever decides which samples come, what is learnt from them and how the learning rate runs. Not in it: how often
    something is measured or saved, and how the same sums are cut into pieces (micro batches, chunks, recomputation,
    layout) or computed (compute_dtype, compile), so that a run can move to another machine.
    """
    whole = plan.model_dump(mode="json")
    kept = {key: whole[key] for key in _IDENTITY_KEYS}
    kept["student"] = {"head": whole["student"]["head"]}
    kept["teacher"] = {key: whole["teacher"][key] for key in ("revision", "dtype", "head")}
    kept["loss"].pop("chunk_tokens")
    kept["teacher_correction"] = None
    if plan.teacher_correction is not None:
        kept["teacher_correction"] = {key: whole["teacher_correction"][key] for key in ("tokens", "optimizer")}
    kept["data"] = data_hash
    return dict(_flat("", kept))


_IDENTITY_KEYS = (
    "fingerprint",
    "teacher_logits",
    "tokens",
    "sequence_length",
    "global_batch_size",
    "optimizer",
    "loss",
    "seed",
)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}".lstrip("."), inner)
    else:
        yield prefix, value
