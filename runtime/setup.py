"""The setup of a training: from its plan to the models, data and optimizer, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.checkpoint import Checkpoints, TrainerState, load
from minitron.runtime.data import Corpus, Data, Windows, open_corpus, open_held_out
from minitron.runtime.feed import Feed
from minitron.runtime.hidden_states import HiddenStates, prepare_hidden_states, read_coordinates
from minitron.runtime.identity import require_same_training
from minitron.runtime.interrupt import Interrupt
from minitron.runtime.loss import DistillationLoss
from minitron.runtime.models import DTYPES, LanguageModel, check_vocabularies, load_model
from minitron.runtime.optimizer import make_optimizer
from minitron.runtime.plan import LoadedPlan
from minitron.runtime.sampled_teacher import stored_logits
from minitron.runtime.saving import Saver
from minitron.runtime.sharding import compile_layers, local, shard_student, shard_teacher
from minitron.runtime.teacher_logits import StoredLogits
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import World
from minitron.specs.builds import CHECKPOINTS
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.errors import Problem, Refused
from minitron.specs.progress import Progress
from minitron.specs.training_plan import TrainingPlan, divisor_within


@dataclass(frozen=True)
class Session:
    """The state that the trainings of one command share: the processes, the data that the key `data` of the plan names,
    with the folder of its tokens, and the progress display.
    """

    world: World
    encoder: TextEncoder
    data: Data
    cache: Path
    interrupt: Interrupt
    progress: Progress

    def open_corpus(self, plan: TrainingPlan) -> Corpus:
        """Opens the samples that the plan trains on, tokenized by the leader where that has not been done."""
        return self.world.leader_first(
            lambda: open_corpus(
                self.data, self.encoder, self.cache,
                length=plan.sequence_length, tokens=plan.tokens, seed=plan.seed, progress=self.progress,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training in this process."""

    plan: TrainingPlan
    world: World
    work: Path
    student: LanguageModel
    """The student in training mode, its weights in the plan's dtype."""

    teacher: LanguageModel | None
    """The teacher; None where no term of the loss needs one."""

    hidden: HiddenStates | None
    """The hidden states that are compared in addition to the logits."""

    stored: StoredLogits | None
    """Samples of the teacher's distribution, where they replace the teacher."""

    corpus: Corpus
    held_out: Windows | None
    optimizer: torch.optim.Optimizer
    saver: Saver
    identity: dict[str, Any]
    """The identity that a checkpoint of this training stores."""

    loss: DistillationLoss
    compute_dtype: torch.dtype

    @cached_property
    def feed(self) -> Feed:
        """Returns the feed of this rank's batches, step after step."""
        plan = self.plan
        return Feed(self.corpus, self.stored, self.world, plan.global_batch_size, plan.micro_batch_size, plan.steps)

    @property
    def flops_per_token(self) -> int | None:
        """Returns the FLOPs of a step per token: the student's forward pass, its backward pass, which takes twice as
        much, and the teacher's forward pass. None where they are not known.
        """
        student, teacher = self.plan.student.flops_per_token, self.plan.teacher.flops_per_token
        if student is None or (self.teacher is not None and teacher is None):
            return None
        return 3 * student + (teacher or 0 if self.teacher is not None else 0)

    def state_after(self, samples: int) -> TrainerState:
        return TrainerState(samples // self.plan.global_batch_size, samples, samples * self.plan.sequence_length)


def prepare(session: Session, loaded: LoadedPlan, identity: dict[str, Any]) -> Run:
    """Opens the data and the models of a plan, for the training that `identity` identifies.

    Refused where the plan does not fit them; WorkError for broken files.
    """
    world, encoder = session.world, session.encoder
    plan = with_micro_batch(loaded.training(), world)
    work = loaded.folder / plan.work
    sampled = plan.teacher_logits != "online" and plan.loss.logits.weight != 0
    stored = stored_logits(loaded, identity) if sampled else None
    corpus = session.open_corpus(plan)
    windows = held_out_windows(loaded, plan.sequence_length, world, encoder, session.cache, session.progress)
    logits, hidden, teacher = plan.loss.logits, plan.loss.hidden_states, None
    if hidden is not None and hidden.weight == 0:
        hidden = None
    if needs_teacher(plan):
        teacher = load_teacher(loaded, world)
    student = _load_student(loaded, world)
    read = [corpus.largest, *([windows.largest] if windows is not None else [])]
    check_vocabularies(loaded, teacher, student, encoder.tokenizer, read)
    if student.positions is not None and plan.sequence_length > student.positions:
        message = f"{plan.sequence_length} tokens are more than the {student.positions} that the models can read"
        raise Refused([Problem("sequence_length", message, f"write at most {student.positions}")])
    states = None
    if hidden is not None and teacher is not None:
        kept = None if plan.kept_coordinates is None else read_coordinates(loaded.folder / plan.kept_coordinates)
        states = prepare_hidden_states(hidden, teacher, student, plan.loss.chunk_tokens, plan.seed, kept)
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
        optimizer=make_optimizer(
            student.module, plan.optimizer, bf16_weights=plan.weights == "bfloat16", seed=plan.seed
        ),
        saver=Saver(
            Checkpoints(work / CHECKPOINTS, plan.checkpoint.keep_last, plan.checkpoint.keep_best),
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


def with_micro_batch(plan: TrainingPlan, world: World) -> TrainingPlan:
    """Returns the plan with the micro batch of a rank: the largest divisor of the rank's share of the global batch that
    does not exceed the plan's micro batch. Refused where the global batch cannot be shared equally.
    """
    whole = plan.global_batch_size
    if whole % world.size:
        message = f"{whole} sequences cannot be shared equally by {world.size} processes"
        hint = f"write a multiple of {world.size}, or start fewer processes"
        raise Refused([Problem("global_batch_size", message, hint)])
    size = divisor_within(whole // world.size, plan.micro_batch_size)
    return plan.model_copy(update={"micro_batch_size": size})


def needs_teacher(plan: TrainingPlan) -> bool:
    """Checks whether a term of the loss is computed from the teacher itself."""
    hidden = plan.loss.hidden_states
    logits = plan.loss.logits.weight != 0 and plan.teacher_logits == "online"
    return logits or (hidden is not None and hidden.weight != 0)


def _compute_dtype(plan: TrainingPlan, world: World) -> torch.dtype:
    return DTYPES[getattr(plan.compute_dtype, world.device.type)]


def load_teacher(loaded: LoadedPlan, world: World) -> LanguageModel:
    """Loads the teacher, frozen, whole on this rank or sharded over all."""
    plan = loaded.training()

    def spread(model: LanguageModel) -> LanguageModel:
        model.module.requires_grad_(False)
        return shard_teacher(model, world)

    place = spread if world.size > 1 and plan.layout.teacher == "sharded" else None
    teacher = load_model(loaded, "teacher", plan.teacher, DTYPES[plan.teacher.dtype], world.device, place)
    teacher.module.requires_grad_(False)
    return teacher


def _load_student(loaded: LoadedPlan, world: World) -> LanguageModel:
    """Loads the student in the plan's dtype of weights, whole on this rank or sharded over all; with one rank nothing
    is sharded, unless the weights rest in host memory. On a CPU bf16 weights are held in fp32, which represents them
    exactly and needs no instructions that most CPUs lack.
    """
    plan = loaded.training()
    held = DTYPES[plan.weights] if world.device.type == "cuda" else torch.float32

    def spread(model: LanguageModel) -> LanguageModel:
        compute, offload = _compute_dtype(plan, world), plan.layout.cpu_offload
        return shard_student(model, world, compute, cpu_offload=offload, weights=held)

    spreads = plan.layout.student == "sharded" and (world.size > 1 or plan.layout.cpu_offload)
    student = load_model(loaded, "student", plan.student, torch.float32, world.device, spread if spreads else None)
    for parameter in student.module.parameters():
        if plan.weights == "bfloat16":
            local(parameter.data).copy_(local(parameter.data).bfloat16())
        if not spreads:
            # Storage of our own, aligned as every allocation is: that of a mapped file is not, and sums may depend
            # on it.
            parameter.data = parameter.data.to(held, copy=True)
    if plan.compile:
        compile_layers(student)
    if plan.gradient_checkpointing:
        recompute(student.module)
    return student


def recompute(module: Any) -> None:
    """Makes the backward pass compute the activations of each layer again, so that they are not stored."""
    # The first name is that of transformers 5.23 and later.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def held_out_windows(
    loaded: LoadedPlan, length: int, world: World, encoder: TextEncoder, cache: Path, progress: Progress
) -> Windows | None:
    """Opens the plan's held-out text in sequences of `length`; None where the plan has none. Refused and WorkError as
    for data.
    """
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


def resume(run: Run, progress: Progress) -> TrainerState:
    """Restores weights and moments from the newest checkpoint and returns the progress of the training."""
    checkpoint = run.saver.checkpoints.newest(progress, run.world)
    if checkpoint is None:
        return run.state_after(0)
    require_same_training(checkpoint.identity, run.identity, run.work)
    load(checkpoint, run.student.module, run.optimizer)
    progress.message(f"going on from step {checkpoint.state.step} of {run.plan.steps}")
    return checkpoint.state
