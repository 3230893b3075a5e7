"""The block `distill`: losses, optimizer, data, layout and checkpoints of distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from minitron.specs.blocks.base import (
    LONGER,
    LONGEST_SEQUENCE,
    WORD,
    Block,
    Count,
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SequenceLength,
    is_longer,
    word_or,
    wrong,
)
from minitron.specs.blocks.choices import Sizes, rates, sizes
from minitron.specs.blocks.training import DistillOptimizer, Optimizer, fit_warmup
from minitron.specs.data import DataSource
from minitron.specs.float8 import Compute
from minitron.specs.tracking import TrackerName


class SampledLogits(Block):
    """The teacher's output distribution, stored as samples (arXiv 2503.16870): in expectation, the gradient equals that
    of the whole distribution. Requires `divergence: forward_kl` and excludes `hidden_states`."""

    sampled: Annotated[int, Field(ge=1, le=65535)]
    """Unbiased samples for each token, drawn in proportion to its probability."""


TeacherLogits: TypeAlias = Annotated[
    Annotated[Literal["online"], Tag(WORD)] | Annotated[SampledLogits, Tag(LONGER)],
    Discriminator(is_longer),
    word_or("online or {sampled: 12}", "online", also=(dict, Block)),
]


class ShuffledBlocks(Block):
    """An order of the sequences that needs only the beginning of the data. The first pass shuffles within blocks, one block
    after the other as they lie in the data; later passes shuffle all of it."""

    block: Count
    """Tokens of a block, cut into whole sequences."""


Shuffle: TypeAlias = Annotated[
    Annotated[Literal["all"], Tag(WORD)] | Annotated[ShuffledBlocks, Tag(LONGER)],
    Discriminator(is_longer),
    word_or("all or {block: 256M}", "all", also=(dict, Block)),
]

LayerPair = Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)]

LayerPairs: TypeAlias = Annotated[
    Annotated[Literal["last:last", "all"], Tag(WORD)] | Annotated[Listed[LayerPair], Field(min_length=1), Tag(LONGER)],
    Discriminator(is_longer),
    word_or(
        "last:last, all, or a list of [teacher layer, student layer] such as [[29, 13]]", "last:last", "all", also=list
    ),
]

# Beyond these bounds a loss cannot be computed in the numbers of a GPU.
Weight: TypeAlias = Annotated[NonNegativeFloat, Field(le=1e6)]
Temperature: TypeAlias = Annotated[PositiveFloat, Field(ge=1e-3, le=1e3)]

LossWeight: TypeAlias = Annotated[
    Annotated[Literal["dynamic"], Tag(WORD)] | Annotated[Weight, Tag(LONGER)],
    Discriminator(is_longer),
    word_or("dynamic or a number such as 0.5", "dynamic", also=(int, float)),
]


class LogitLoss(Block):
    """The divergence between the teacher's and the student's distribution of the next token."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student); `reverse_kl`: KL(student || teacher); `jsd`: Jensen-Shannon."""

    temperature: Temperature = 1.0
    """Both distributions are softened by it; the loss is multiplied by its square."""

    weight: Weight = 1.0
    """Share in the sum of losses."""


class HiddenStateLoss(Block):
    """The distance between hidden states of teacher and student (Minitron, arXiv 2407.14679, section 3), in the coordinates
    that `coordinates` names. `coordinates: kept` changes what is left out to `pairs: all`, `distance: mse`,
    `embedding: false`, `weight: 10` and `schedule: linear`."""

    coordinates: Literal["projected", "kept"] = "projected"
    """The coordinates that states of different widths are compared in. `projected`: one linear projection for all pairs
    takes the student's states to the teacher's width; it is trained with the student and discarded afterwards. `kept`:
    the teacher's states are reduced to what the student keeps of them, its channels or, with `hidden_basis: principal`,
    its components; nothing is trained."""

    pairs: LayerPairs = "last:last"
    """`last:last`; `all`: every layer of the student with the layer of the teacher that it was cut from; or pairs of [teacher
    layer, student layer]: what these decoder layers yield, counted from 0 in each model's own numbering."""

    distance: Literal["cosine", "mse"] = "cosine"
    """`cosine`: 1 - cosine similarity; `mse`: mean squared difference, in units of the teacher state's mean square."""

    embedding: bool = True
    """Compares the input of the first layers, the embeddings, as well."""

    weight: LossWeight = "dynamic"
    """`dynamic`: the logit loss divided by this one, for each sequence and without a gradient; or a number. Distances of
    `projected` states are summed over the pairs, those of `kept` ones averaged."""

    schedule: Literal["constant", "linear"] = "constant"
    """`linear`: the weight falls in a straight line to 0 at the last step."""

    @model_validator(mode="after")
    def _defaults_of_kept(self) -> HiddenStateLoss:
        """Fills in what suits kept coordinates where it is not written."""
        if self.coordinates == "projected":
            return self
        defaults = {key: value for key, value in _OF_KEPT.items() if key not in self.model_fields_set}
        return self.model_copy(update=defaults)


# Measured in docs/method.md.
_OF_KEPT: dict[str, Any] = {"pairs": "all", "distance": "mse", "embedding": False, "weight": 10.0, "schedule": "linear"}


class Loss(Block):
    """The training loss: the weighted sum of these terms."""

    logits: LogitLoss = LogitLoss()
    """The divergence of the output distributions."""

    hidden_states: HiddenStateLoss | None = None
    """The distance of hidden states; null: none."""

    cross_entropy: Weight = 0.0
    """Weight of the cross-entropy with the data's own next token."""

    chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time: more is faster, less takes less memory."""

    @property
    def compared(self) -> HiddenStateLoss | None:
        """Returns the term of hidden states; None where there is none, or its weight is 0."""
        return self.hidden_states if self.hidden_states is not None and self.hidden_states.weight != 0 else None

    def reads_teacher(self, teacher_logits: TeacherLogits) -> bool:
        """Checks whether a term is computed from the teacher itself, not from stored samples or the text alone."""
        return self.compared is not None or (self.logits.weight != 0 and teacher_logits == "online")


def _check_recomputation(value: Any) -> Any:
    if not isinstance(value, bool) and value != "attention":
        raise wrong("{given} is not a valid value", "write true, attention or false")
    return value


Recomputation: TypeAlias = Annotated[bool | Literal["attention"], BeforeValidator(_check_recomputation)]


class Layout(Block):
    """The distribution of models and training state over several devices."""

    student: Literal["sharded", "replicated"] = "sharded"
    """`sharded`: every device holds its share of the weights, gradients and moments (FSDP); `replicated`: all of them."""

    teacher: Literal["sharded", "replicated"] | None = None
    """The same for the teacher. Left out: replicated up to 32 GiB of weights, sharded beyond."""

    cpu_offload: bool = False
    """The student's weights, gradients and moments rest in host memory: slower, for a device that cannot hold them."""


class CheckpointSettings(Block):
    """The checkpoints from which an interrupted training resumes."""

    every_tokens: Count | None = None
    """A checkpoint each time that this many tokens were trained on. Left out: twenty over the whole training."""

    keep_last: PositiveInt = 2
    """The number of checkpoints that are kept."""

    keep_best: bool = True
    """The one with the lowest held-out loss is kept as well, of those that were saved when it was measured."""


# Where the batch is not written, a training has at least this many steps.
LEAST_STEPS = 300


class DistillPhase(Block):
    """A stretch of the training with settings of its own; the schedule runs on, and what is left out is as in `distill`."""

    tokens: Count
    """The training's tokens that belong to this phase, rounded up to whole global batches."""

    sequence_length: SequenceLength | None = None
    """Tokens in a sequence. Left out: as in `distill`."""

    global_batch_size: PositiveInt | None = None
    """Sequences in an optimizer step. Left out: as in `distill`."""

    micro_batch_size: PositiveInt | None = None
    """At most this many sequences go through the model at one time. Left out: the compiler chooses."""

    data: DataSource | None = None
    """The data to train on. Left out: as in `distill`; where the length stays too, the phase goes on with the sequences
    that the one before has left."""


class Distill(Block):
    """The distillation of the student from the teacher. Without this block `minitron compile` only prunes, and nothing
    is trained."""

    data: DataSource
    """The data to train on."""

    tokens: Count
    """The number of tokens to train on."""

    phases: Listed[DistillPhase] = ()
    """Stretches of the training, one after the other, such as longer sequences towards the end; their `tokens` make up those of
    the training. Left out: one phase."""

    teacher_logits: TeacherLogits = "online"
    """`online`: the teacher runs beside the student; `{sampled: 12}`: `minitron capture` stores its samples once."""

    sequence_length: SequenceLength = LONGEST_SEQUENCE
    """Tokens in a sequence. Left out: 4096, or fewer where the teacher reads fewer. Documents are packed into them one
    after the other, BOS before and EOS after each where the tokenizer has them; attention reaches across
    documents."""

    global_batch_size: Sizes = 768
    """Sequences in an optimizer step, over all devices; under `search` a list or a range. Left out: 768, and fewer where
    `tokens` would not make 300 steps."""

    micro_batch_size: PositiveInt | None = None
    """At most this many sequences go through the model at one time: each device takes the largest divisor of its share of
    `global_batch_size`. Left out: the compiler chooses."""

    optimizer: DistillOptimizer = DistillOptimizer()
    """The optimizer and its schedule."""

    weights: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the student's weights and gradients while it trains. `bfloat16` halves their memory; weights are rounded
    at random, so that changes too small for bfloat16 are not lost (arXiv 2010.06192)."""

    compute: Compute = "bfloat16"
    """The dtype of the products in the linear layers inside of the student's decoder layers, where a GPU trains. `float8`: e4m3
    with a scale for each row, forward and backward (`pip install 'minitron[float8]'`); twice as fast at its peak, on GPUs of
    compute capability 8.9 or later, best with `compile: true`. Embedding, head, routers and experts stay as they are, weights
    and moments too. A CPU emulates it."""

    loss: Loss = Loss()
    """The loss that is minimised."""

    gradient_checkpointing: Recomputation | None = None
    """The activations that the backward pass computes again instead of keeping them: `true` all inside of a layer,
    about a third more work; `attention` those of its attention alone; `false` none. Left out: the least that fits a
    device of 80 GB, by the plan's estimate."""

    compile: bool = False
    """Compile the layers of student and teacher with torch.compile: slow to start, faster afterwards."""

    layout: Layout = Layout()
    """The models on each device, where several train together."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """The checkpoints that an interrupted training goes on from."""

    track: Listed[TrackerName] | None = None
    """The trackers that metrics go to beside train/metrics.jsonl. `wandb` and `mlflow` take their own variables (WANDB_MODE,
    MLFLOW_TRACKING_URI). Left out: `tensorboard` where it is installed."""

    seed: NonNegativeInt = 0
    """Decides the order of the data."""

    shuffle: Shuffle = "all"
    """`all`: one shuffle of all sequences; training begins when all of the data is tokenized. `{block: 256M}`: a shuffle within
    blocks of that many tokens; training begins with the first block, while the rest is tokenized, and nothing is read that it
    does not reach."""

    @property
    def trained_tokens(self) -> int:
        """Returns the tokens of whole steps that `tokens` come to: a last step is not cut short."""
        if self.phases:
            return sum(self.alone(phase).trained_tokens for phase in self.phases)
        return self.whole_steps(self.tokens)

    def whole_steps(self, tokens: int) -> int:
        """Returns `tokens` rounded up to whole optimizer steps."""
        if not isinstance(self.global_batch_size, int):  # a search chooses it
            return tokens
        step = self.global_batch_size * self.sequence_length
        return -(-tokens // step) * step

    def at_length(self, length: int, *, fit_batch: bool) -> Distill:
        """Returns the distillation in sequences of another length; with `fit_batch` the batch is chosen for it as if none
        was written."""
        update: dict[str, Any] = {"sequence_length": length}
        if fit_batch:
            default = max(sizes(type(self).model_fields["global_batch_size"].default))
            update["global_batch_size"] = max(1, min(default, self.tokens // (length * LEAST_STEPS)))
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _fit_to_tokens(self) -> Distill:
        """Fits batch size and warm-up to the number of tokens if neither is written, because the defaults suit long
        trainings; and fills in what phases leave out."""
        changes: dict[str, Any] = {}
        batch = max(sizes(self.global_batch_size))
        if not self.model_fields_set & {"global_batch_size", "micro_batch_size"}:
            batch = max(1, min(batch, self.tokens // (self.sequence_length * LEAST_STEPS)))
            changes["global_batch_size"] = batch
        phases = tuple(
            phase.model_copy(
                update={
                    "sequence_length": phase.sequence_length or self.sequence_length,
                    "global_batch_size": phase.global_batch_size or batch,
                    "micro_batch_size": phase.micro_batch_size or self.micro_batch_size,
                }
            )
            for phase in self.phases
        )
        changes["phases"] = phases
        steps = sum(one.tokens // ((one.sequence_length or 1) * (one.global_batch_size or 1)) for one in phases)
        optimizer = fit_warmup(self.optimizer, steps if phases else self.tokens // (self.sequence_length * batch))
        return self.model_copy(update=changes | {"optimizer": optimizer})

    @property
    def batch(self) -> int:
        """The sequences of an optimizer step, of a training that runs: a search gives each candidate its own."""
        (size,) = sizes(self.global_batch_size)
        return size

    @property
    def adamw(self) -> Optimizer:
        """The optimizer of a training that runs: a search gives each candidate its own."""
        (rate,) = rates(self.optimizer.lr)
        return self.optimizer.at(rate)

    def chosen(self, lr: float, batch: int) -> Distill:
        """Returns the distillation at one learning rate and batch size."""
        optimizer = self.optimizer.model_copy(update={"lr": lr})
        return self.model_copy(update={"optimizer": optimizer, "global_batch_size": batch})

    @property
    def needs_teacher(self) -> bool:
        """Checks whether a term of the loss is computed from the teacher itself."""
        return self.loss.reads_teacher(self.teacher_logits)

    def alone(self, phase: DistillPhase) -> Distill:
        """Returns the distillation that consists of this phase alone."""
        values = {
            key: getattr(phase, key) for key in ("tokens", "sequence_length", "global_batch_size", "micro_batch_size")
        }
        return self.model_copy(update=values | {"phases": (), "data": phase.data or self.data})
