"""The setup of a training: from its plan to the models, data and optimizer, ready to run."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.arrivals import Arrivals, begin_corpora, wanted_of
from minitron.runtime.checkpoint import Checkpoints, TrainerState, load
from minitron.runtime.course import Course, Stretch
from minitron.runtime.data import Corpus, Data, Wanted, Windows, data_hash, open_corpus, open_held_out
from minitron.runtime.feed import Feed
from minitron.runtime.float8 import (
    TEACHER,
    compute_student_in_float8,
    hold_teacher_in_float8,
    student_computes_in,
)
from minitron.runtime.hidden_states import HiddenStates, Recorder, prepare_hidden_states, read_coordinates
from minitron.runtime.identity import require_same_start, require_same_training
from minitron.runtime.interrupt import Interrupt
from minitron.runtime.loss import DistillationLoss
from minitron.runtime.models import DTYPES, LanguageModel, check_read, check_vocabularies, load_model
from minitron.runtime.muon import layer_matrices
from minitron.runtime.optimizer import make_optimizer
from minitron.runtime.plan import LoadedPlan
from minitron.runtime.recomputation import recompute
from minitron.runtime.sampled_teacher import stored_logits
from minitron.runtime.saving import Saver
from minitron.runtime.sharding import compile_layers, local, shard_student, shard_teacher
from minitron.runtime.teacher_logits import StoredLogits
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import World
from minitron.specs.builds import CHECKPOINTS
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.errors import Problem, Refused, first_line
from minitron.specs.progress import Progress, Silent
from minitron.specs.training_plan import TrainingPlan, divisor_within, needs_teacher


@dataclass(frozen=True)
class Session:
    """The state that the trainings of one command share: the processes, the data that the key `data` of the plan names
    and that of each of its phases, with the folder of its tokens, and the progress display.
    """

    world: World
    encoder: TextEncoder
    data: Data
    cache: Path
    interrupt: Interrupt
    progress: Progress
    phases: tuple[Data, ...] = ()
    closing: ExitStack = field(default_factory=ExitStack)
    """The end of what works beside the trainings."""

    @classmethod
    def open(cls, loaded: LoadedPlan, cache: Path, world: World, interrupt: Interrupt, progress: Progress) -> Session:
        """Reads the tokenizer and the data that a plan names. Refused for files that do not exist, WorkError for files that
        cannot be read.
        """
        plan = loaded.training()

        def read(at: str, source: DataSource) -> Data:
            return world.from_leader(lambda: Data.read(loaded.data(at, source)))

        encoder, data = TextEncoder.load(loaded.folder / plan.tokenizer), read("data", plan.data)
        phases = tuple(
            data if phase.data is None else read(f"phases.{number}.data", phase.data)
            for number, phase in enumerate(plan.phases)
        )
        return cls(world, encoder, data, cache, interrupt, progress if world.leads else Silent(), phases)

    def begin_corpora(self, plan: TrainingPlan) -> tuple[tuple[Corpus, ...], Arrivals | None]:
        """Opens the samples that the plan trains on, as `open_corpora` does; where their order allows it, before all of them
        are tokenized: then the arrivals tell of the rest.
        """
        if plan.shuffle == "all":
            return self.open_corpora(plan), None
        of = [
            (self._data(plan, stretch), wanted_of(plan, number))
            for number, (stretch, _) in enumerate(Course.of(plan).corpora())
        ]
        corpora, arrivals = begin_corpora(of, self.encoder, self.cache, self.world, self.progress)
        if arrivals is not None:
            self.closing.callback(arrivals.close)
        return corpora, arrivals

    def open_corpora(self, plan: TrainingPlan) -> tuple[Corpus, ...]:
        """Opens the samples that the plan trains on, tokenized by the leader where that has not been done: a corpus for
        all phases in turn that have data and length in common.
        """
        return tuple(
            self._open(self._data(plan, stretch), wanted_of(plan, number))
            for number, (stretch, _) in enumerate(Course.of(plan).corpora())
        )

    def _open(self, data: Data, wanted: Wanted) -> Corpus:
        return self.world.leader_first(lambda: open_corpus(data, self.encoder, self.cache, wanted, self.progress))

    def _data(self, plan: TrainingPlan, stretch: Stretch) -> Data:
        return self.phases[stretch.number] if plan.phases else self.data

    def data_hash(self, plan: TrainingPlan) -> str:
        """Returns the hash of everything that decides the samples that the plan trains on, wherever they lie."""
        hashes = [
            data_hash(self._data(plan, stretch), self.encoder, tokens) for stretch, tokens in Course.of(plan).corpora()
        ]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


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

    course: Course
    corpora: tuple[Corpus, ...]
    """The samples of the course's phases."""

    held_out: Windows | None
    optimizer: torch.optim.Optimizer
    saver: Saver
    identity: dict[str, Any]
    """The identity that a checkpoint of this training stores."""

    loss: DistillationLoss
    compute_dtype: torch.dtype
    arrivals: Arrivals | None = None
    """The tokens of the corpora that are still being made; None where all are there."""

    begins_from: Path | None = None
    """The folder of the checkpoint that a search left of this student; None where the training begins at its beginning."""

    @property
    def beside(self) -> AbstractContextManager[object]:
        """Ends what works beside the steps."""
        return nullcontext() if self.arrivals is None else closing(self.arrivals)

    @cached_property
    def feed(self) -> Feed:
        """Returns the feed of this rank's batches, step after step."""
        return Feed(self.corpora, self.stored, self.world, self.course, self.plan.steps)


def prepare(session: Session, loaded: LoadedPlan, identity: dict[str, Any]) -> Run:
    """Opens the data and the models of a plan, for the training that `identity` identifies.

    Refused where the plan does not fit them; WorkError for broken files.
    """
    world, encoder = session.world, session.encoder
    plan = with_micro_batch(loaded.training(), world)
    work = loaded.folder / plan.work
    sampled = plan.teacher_logits != "online" and plan.loss.logits.weight != 0
    stored = stored_logits(loaded, identity) if sampled else None
    corpora, arrivals = session.begin_corpora(plan)
    windows = held_out_windows(loaded, plan.sequence_length, world, encoder, session.cache, session.progress)
    teacher = load_teacher(loaded, world) if needs_teacher(plan) else None
    student = load_student(loaded, world)
    read = [*(corpus.largest for corpus in corpora), *([windows.largest] if windows is not None else [])]
    check_vocabularies(loaded, teacher, student, encoder.tokenizer, read)
    if arrivals is not None:
        arrivals.check = lambda largest: check_read(student, encoder.tokenizer, [largest])
    _check_lengths(plan, student)
    hidden = None if teacher is None else hidden_states_of(loaded, teacher, student)
    student.module.train()
    return Run(
        plan=plan,
        world=world,
        work=work,
        student=student,
        teacher=teacher,
        hidden=hidden,
        stored=stored,
        course=Course.of(plan),
        corpora=corpora,
        arrivals=arrivals,
        held_out=windows,
        optimizer=optimizer_of(plan, student),
        saver=Saver(
            Checkpoints(work / CHECKPOINTS, plan.checkpoint.keep_last, plan.checkpoint.keep_best),
            identity,
            world,
            spread=student.root is not None,
        ),
        identity=identity,
        loss=loss_of(plan),
        compute_dtype=compute_dtype_of(plan, world),
        begins_from=None if plan.start is None else loaded.folder / plan.start.checkpoints,
    )


def hidden_states_of(
    loaded: LoadedPlan, teacher: LanguageModel, student: LanguageModel, recorder: Recorder | None = None
) -> HiddenStates | None:
    """Hooks the models where the plan compares hidden states; else returns None. With a `recorder` the teacher is hooked
    already.
    """
    plan = loaded.training()
    if (settings := plan.loss.compared) is None:
        return None
    kept = None if plan.kept_coordinates is None else read_coordinates(loaded.folder / plan.kept_coordinates)
    return prepare_hidden_states(settings, teacher, student, plan.loss.chunk_tokens, plan.seed, kept, recorder)


def loss_of(plan: TrainingPlan) -> DistillationLoss:
    """Returns the loss over logits and labels that a plan trains with."""
    logits = plan.loss.logits
    return DistillationLoss(
        divergence=logits.divergence,
        temperature=logits.temperature,
        weight=logits.weight,
        cross_entropy=plan.loss.cross_entropy,
        chunk_tokens=plan.loss.chunk_tokens,
    )


def optimizer_of(plan: TrainingPlan, student: LanguageModel) -> torch.optim.Optimizer:
    """Returns the optimizer of a plan, over the weights of its student."""
    return make_optimizer(
        student.module,
        plan.optimizer,
        matrices=layer_matrices(student),
        bf16_weights=plan.weights == "bfloat16",
        seed=plan.seed,
    )


def with_micro_batch(plan: TrainingPlan, world: World) -> TrainingPlan:
    """Returns the plan with the micro batch of a rank, in each phase: the largest divisor of the rank's share of the
    global batch that does not exceed the plan's micro batch. Refused where a global batch cannot be shared equally.
    """
    micro = _share(plan.global_batch_size, plan.micro_batch_size, world, "global_batch_size")
    phases = tuple(
        phase.model_copy(
            update={
                "micro_batch_size": _share(
                    phase.global_batch_size, phase.micro_batch_size, world, f"phases.{number}.global_batch_size"
                )
            }
        )
        for number, phase in enumerate(plan.phases)
    )
    return plan.model_copy(update={"micro_batch_size": micro, "phases": phases})


def _share(whole: int, most: int, world: World, at: str) -> int:
    """Returns the micro batch of a rank for a global batch of `whole` sequences, no more than `most`."""
    if whole % world.size:
        message = f"{whole} sequences cannot be shared equally by {world.size} processes"
        raise Refused([Problem(at, message, f"write a multiple of {world.size}, or start fewer processes")])
    return divisor_within(whole // world.size, most)


def _check_lengths(plan: TrainingPlan, student: LanguageModel) -> None:
    """Checks that the models can read sequences of each phase's length. Refused where they cannot."""
    lengths = {"sequence_length": plan.sequence_length}
    lengths |= {f"phases.{number}.sequence_length": phase.sequence_length for number, phase in enumerate(plan.phases)}
    for at, length in lengths.items():
        if student.positions is not None and length > student.positions:
            message = f"{length} tokens are more than the {student.positions} that the models can read"
            raise Refused([Problem(at, message, f"write at most {student.positions}")])


def compute_dtype_of(plan: TrainingPlan, world: World) -> torch.dtype:
    """Returns the dtype of the student's forward and backward on this device, around what is computed in float8."""
    name = getattr(plan.compute_dtype, world.device.type)
    around = "bfloat16" if world.device.type == "cuda" else "float32"
    return DTYPES[around if name == "float8" else name]


def load_teacher(loaded: LoadedPlan, world: World) -> LanguageModel:
    """Loads the teacher, frozen, whole on this rank or sharded over all, in float8 where the plan says so. Refused where its
    code cannot compute so.
    """
    plan = loaded.training()
    shards = world.size > 1 and plan.layout.teacher == "sharded"

    def place(model: LanguageModel) -> LanguageModel:
        model.module.requires_grad_(False)
        if plan.teacher.compute == "float8":
            # One weight after the other is on the device in its own dtype: all of them might not fit.
            hold_teacher_in_float8(model, world.device, torch.device("cpu") if shards else world.device)
        if shards:
            return shard_teacher(model, world)
        model.module.to(world.device)
        return model

    try:
        placed = place if shards or plan.teacher.compute == "float8" else None
        teacher = load_model(loaded, "teacher", plan.teacher, DTYPES[plan.teacher.dtype], world.device, placed)
    except AttributeError as error:
        if plan.teacher.compute != "float8":
            raise
        message = f"this model's code cannot compute in float8 ({first_line(error)})"
        raise Refused([Problem(TEACHER, message, "write bfloat16")]) from None
    teacher.module.requires_grad_(False)
    if plan.compile:
        compile_layers(teacher)
    return teacher


def load_student(loaded: LoadedPlan, world: World) -> LanguageModel:
    """Loads the student in the plan's dtype of weights, whole on this rank or sharded over all; with one rank nothing
    is sharded, unless the weights rest in host memory. On a CPU bf16 weights are held in fp32, which represents them
    exactly and needs no instructions that most CPUs lack.
    """
    plan = loaded.training()
    held = DTYPES[plan.weights] if world.device.type == "cuda" else torch.float32

    float8 = student_computes_in(plan, world.device) == "float8"

    def spread(model: LanguageModel) -> LanguageModel:
        compute, offload = compute_dtype_of(plan, world), plan.layout.cpu_offload
        if float8:
            compute_student_in_float8(model, world.device, plan)
        return shard_student(model, world, compute, cpu_offload=offload, weights=held)

    spreads = plan.layout.student == "sharded" and (world.size > 1 or plan.layout.cpu_offload)
    student = load_model(loaded, "student", plan.student, torch.float32, world.device, spread if spreads else None)
    if float8 and not spreads:
        compute_student_in_float8(student, world.device, plan)
    for parameter in student.module.parameters():
        if plan.weights == "bfloat16":
            local(parameter.data).copy_(local(parameter.data).bfloat16())
        if not spreads:
            # Storage of our own, aligned as every allocation is: that of a mapped file is not, and sums may depend
            # on it.
            parameter.data = parameter.data.to(held, copy=True)
    if plan.compile:
        compile_layers(student)
    recompute(student, plan.gradient_checkpointing)
    return student


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


def _begin(run: Run, progress: Progress) -> TrainerState:
    """Returns the state of a training without a checkpoint of its own: its beginning, or what a search left of its student."""
    start, folder = run.plan.start, run.begins_from
    if start is None or folder is None:
        return run.course.state(0)
    checkpoint = Checkpoints(folder, 1).newest(progress, run.world)
    hint = "search again (`minitron compile`), or remove `start` to train from the beginning"
    if checkpoint is None or checkpoint.state.step != start.step:
        raise Refused([Problem("start", f"{folder} holds no checkpoint of step {start.step}", hint)])
    require_same_start(checkpoint.identity, run.identity, hint)
    load(checkpoint, run.student.module, run.optimizer)
    progress.message(f"going on from step {start.step} of {run.plan.steps}, where the search left this student")
    return checkpoint.state


def resume(run: Run, progress: Progress) -> TrainerState:
    """Restores weights and moments from the newest checkpoint and returns the progress of the training."""
    checkpoint = run.saver.checkpoints.newest(progress, run.world)
    if checkpoint is None:
        return _begin(run, progress)
    require_same_training(checkpoint.identity, run.identity, run.work)
    load(checkpoint, run.student.module, run.optimizer)
    progress.message(f"going on from step {checkpoint.state.step} of {run.plan.steps}")
    return checkpoint.state
