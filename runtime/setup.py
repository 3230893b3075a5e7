"""From a training plan to everything that its training needs, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.checkpoint import Checkpoints, TrainerState, load
from minitron.runtime.correction import WEIGHTS
from minitron.runtime.data import Corpus, Data, Windows, open_corpus, open_held_out
from minitron.runtime.hidden_states import HiddenStates, prepare_hidden_states
from minitron.runtime.loss import DistillationLoss
from minitron.runtime.models import DTYPES, LanguageModel, check_vocabularies, load_model
from minitron.runtime.optimizer import make_optimizer
from minitron.runtime.plan import LoadedPlan, TrainingPlan
from minitron.runtime.sampled_teacher import stored_logits
from minitron.runtime.saving import Saver
from minitron.runtime.sharding import compile_layers, shard_student, shard_teacher
from minitron.runtime.teacher_logits import StoredLogits
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import World
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.errors import SpecInvalid
from minitron.specs.progress import Progress, Silent


@dataclass(frozen=True)
class Run:
    """A training in this process."""

    plan: TrainingPlan
    world: World
    work: Path
    student: LanguageModel
    """fp32, in training mode."""

    teacher: LanguageModel | None
    """None where no term needs one."""

    hidden: HiddenStates | None
    """What is compared beside the logits."""

    stored: StoredLogits | None
    """Samples of the teacher's distribution, where they stand in for it."""

    corpus: Corpus
    held_out: Windows | None
    optimizer: torch.optim.Optimizer
    saver: Saver
    identity: dict[str, Any]
    """What a checkpoint of this training remembers of the plan."""

    loss: DistillationLoss
    compute_dtype: torch.dtype

    @property
    def flops_per_token(self) -> int | None:
        """Of a step: the student's forward and its backward, which is twice as much, and the teacher's forward."""
        student, teacher = self.plan.student.flops_per_token, self.plan.teacher.flops_per_token
        if student is None or (self.teacher is not None and teacher is None):
            return None
        return 3 * student + (teacher or 0 if self.teacher is not None else 0)

    def state_after(self, samples: int) -> TrainerState:
        return TrainerState(samples // self.plan.global_batch_size, samples, samples * self.plan.sequence_length)


def prepare(
    loaded: LoadedPlan,
    plan: TrainingPlan,
    data: Data,
    world: World,
    encoder: TextEncoder,
    identity: dict[str, Any],
    cache: Path,
    progress: Progress,
) -> Run:
    """Opens data and models; `data` is what the plan names as `data`, `cache` the folder of tokenized data.

    SpecInvalid with the place where the plan does not fit them; WorkError for broken
    files."""
    if plan.global_batch_size % (world.size * plan.micro_batch_size):
        least = world.size * plan.micro_batch_size
        shares = f"{world.size} processes, {plan.micro_batch_size} at a time"
        message = f"{plan.global_batch_size} sequences cannot be shared by {shares}"
        raise loaded.invalid("global_batch_size", message, f"write a multiple of {least}, or start fewer processes")
    work = loaded.folder / plan.work
    sampled = plan.teacher_logits != "online" and plan.loss.logits.weight != 0
    stored = stored_logits(loaded, identity) if sampled else None
    corpus, windows = _open_data(loaded, plan, data, world, encoder, cache, progress if world.leads else Silent())
    logits, hidden, teacher = plan.loss.logits, plan.loss.hidden_states, None
    if hidden is not None and hidden.weight == 0:
        hidden = None
    if needs_teacher(plan):
        teacher = load_teacher(loaded, plan, world)
    student = _load_student(loaded, plan, world)
    check_vocabularies(loaded, teacher, student, encoder.tokenizer)
    if student.positions is not None and plan.sequence_length > student.positions:
        message = f"{plan.sequence_length} tokens are more than the {student.positions} that the models can read"
        raise loaded.invalid("sequence_length", message, f"write at most {student.positions}")
    states = None
    if hidden is not None and teacher is not None:
        states = prepare_hidden_states(loaded, hidden, teacher, student, plan.loss.chunk_tokens, plan.seed)
    student.module.train()
    return Run(
        plan=plan,
        world=world,
        work=work,
        student=student,
        teacher=teacher,
        hidden=states,
        stored=stored,
        corpus=corpus,
        held_out=windows,
        optimizer=make_optimizer(student.module, plan.optimizer),
        saver=Saver(
            Checkpoints(work / "checkpoints", plan.checkpoint.keep_last, plan.checkpoint.keep_best),
            identity,
            world,
            spread=student.root is not None,
        ),
        identity=identity,
        loss=DistillationLoss(
            divergence=logits.divergence,
            temperature=logits.temperature,
            weight=logits.weight,
            cross_entropy=plan.loss.cross_entropy,
            chunk_tokens=plan.loss.chunk_tokens,
        ),
        compute_dtype=_compute_dtype(plan, world),
    )


def needs_teacher(plan: TrainingPlan) -> bool:
    """Whether a term of the loss is computed from the teacher itself."""
    hidden = plan.loss.hidden_states
    logits = plan.loss.logits.weight != 0 and plan.teacher_logits == "online"
    return logits or (hidden is not None and hidden.weight != 0)


def _compute_dtype(plan: TrainingPlan, world: World) -> torch.dtype:
    return DTYPES[getattr(plan.compute_dtype, world.device.type)]


def load_teacher(loaded: LoadedPlan, plan: TrainingPlan, world: World) -> LanguageModel:
    """The teacher, frozen, whole on this rank or spread over all."""

    def spread(model: LanguageModel) -> LanguageModel:
        model.module.requires_grad_(False)
        return shard_teacher(model, world)

    place = spread if world.size > 1 and plan.layout.teacher == "sharded" else None
    teacher = load_model(loaded, "teacher", plan.teacher, DTYPES[plan.teacher.dtype], world.device, place)
    teacher.module.requires_grad_(False)
    return teacher


def _load_student(loaded: LoadedPlan, plan: TrainingPlan, world: World) -> LanguageModel:
    """The student in fp32, whole on this rank or spread over all; one rank alone spreads nothing, unless its weights
    rest in host memory."""

    def spread(model: LanguageModel) -> LanguageModel:
        return shard_student(model, world, _compute_dtype(plan, world), cpu_offload=plan.layout.cpu_offload)

    spreads = plan.layout.student == "sharded" and (world.size > 1 or plan.layout.cpu_offload)
    student = load_model(loaded, "student", plan.student, torch.float32, world.device, spread if spreads else None)
    if not spreads:
        for parameter in student.module.parameters():
            # Storage of our own, aligned as every allocation is: that of a mapped file is not, and sums may depend
            # on it.
            parameter.data = parameter.data.clone()
    if plan.compile:
        compile_layers(student)
    if plan.gradient_checkpointing:
        recompute(student.module)
    return student


def recompute(module: Any) -> None:
    """Has the activations of each layer computed again in the backward pass instead of keeping them."""
    # The first name is that of transformers 5.23 and later.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _open_data(
    loaded: LoadedPlan,
    plan: TrainingPlan,
    data: Data,
    world: World,
    encoder: TextEncoder,
    cache: Path,
    progress: Progress,
) -> tuple[Corpus, Windows | None]:
    length = plan.sequence_length
    corpus = world.leader_first(
        lambda: open_corpus(data, encoder, cache, length=length, tokens=plan.tokens, seed=plan.seed, progress=progress)
    )
    return corpus, held_out_windows(loaded, length, world, encoder, cache, progress)


def held_out_windows(
    loaded: LoadedPlan, length: int, world: World, encoder: TextEncoder, cache: Path, progress: Progress
) -> Windows | None:
    """The plan's held-out text in sequences of `length`; None where it has none. SpecInvalid and WorkError as for data."""
    if (of := loaded.plan.held_out) is None:
        return None

    def read() -> tuple[DataSource, str]:
        source = loaded.data("held_out.data", of.data)
        return source, content_hash(source)

    source, content = world.from_leader(read)
    return world.leader_first(
        lambda: open_held_out(
            source, content, encoder, cache, length=length, max_tokens=of.max_tokens, progress=progress
        )
    )


def resume(loaded: LoadedPlan, run: Run, progress: Progress) -> TrainerState:
    """How far this training already is; weights and moments are set to where they were then."""
    checkpoint = run.saver.checkpoints.newest(progress, run.world)
    if checkpoint is None:
        return run.state_after(0)
    require_same_training(loaded, checkpoint.identity, run.identity)
    load(checkpoint, run.student.module, run.optimizer)
    progress.message(f"going on from step {checkpoint.state.step} of {run.plan.steps}")
    return checkpoint.state


def require_same_training(loaded: LoadedPlan, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """SpecInvalid with every value that decides the result and is not what it was when this training began. Weights of a
    teacher count where they are known of both."""
    begin_again = f"or delete {loaded.folder / loaded.plan.work} to train from the beginning"
    changed = {
        "data": "the training data or its tokenizer", "fingerprint": "the pruned student", WEIGHTS: "the teacher"
    }  # fmt: skip
    errors = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or (key == WEIGHTS and None in (old, new)):
            continue
        if key in changed:
            message, remedy = f"{changed[key]} changed since this training began", "bring back what was there"
        else:
            message, remedy = f"was {old} when this training began and is now {new}", f"write {old} again"
        errors.append(loaded.error("teacher.model" if key == WEIGHTS else key, message, f"{remedy}, {begin_again}"))
    if errors:
        raise SpecInvalid(errors)
