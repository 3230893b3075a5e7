"""Generates training.yaml: the training plan with every value resolved. The runtime reads it and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.estimate.training_defaults import CHECKPOINTS, measure_every, micro_batch, place_teacher
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.blocks.benchmarks import benchmarks
from minitron.specs.blocks.distill import Distill, Recomputation
from minitron.specs.blocks.evaluate import Evaluate
from minitron.specs.blocks.teacher_correction import TeacherCorrection
from minitron.specs.builds import CORRECTION_WORK, MODEL, STUDENT, TEACHER, WORK
from minitron.specs.data import DataSource
from minitron.specs.data_files import data_files, resolve_data
from minitron.specs.load import LoadedSpec
from minitron.specs.spec import Spec
from minitron.specs.training_plan import (
    FORMAT_VERSION,
    CheckpointPlan,
    ComputeDtype,
    CorrectionPlan,
    EvaluatePlan,
    EvaluationPlan,
    HeadPlan,
    HeldOutPlan,
    LayoutPlan,
    ModelPlan,
    PhasePlan,
    TeacherPlan,
    TrainingPlan,
    step_flops,
    to_document,
)

HEADER = """\
# The training plan that minitron generated from {spec}.
# Every value stands here and nothing is implied; it can be read, edited and run: minitron train {build}
"""


def training_plan(
    loaded: LoadedSpec,
    build: Path,
    checkpoint: Checkpoint,
    heads: Mapping[str, HeadPlan],
    layers: str,
    fingerprint: str,
    costs: Mapping[str, ModelCosts],
) -> EvaluationPlan:
    """Builds the plan; a TrainingPlan where the spec distils. `layers`, the module list of the decoder layers, is that
    of both models; `heads` and `costs` have those of `teacher` and `student`; `fingerprint` identifies the student that
    is trained. `aligned` adds what depends on the selection."""
    spec = loaded.spec
    distill, evaluate = spec.distill, spec.evaluate
    length = None if distill is None else distill.sequence_length
    every = None if distill is None else _checkpoint_every(distill, distill.tokens)
    sources = resolve_data(loaded)
    common: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": spec.name,
        "fingerprint": fingerprint,
        **_models(spec, build, checkpoint, heads, layers, costs, length),
        "tokenizer": STUDENT,
        "output": MODEL,
        "work": WORK,
        "held_out": _held_out(evaluate, sources, every),
        "evaluate": _evaluation(loaded, evaluate or Evaluate()),
    }
    if distill is None:
        return EvaluationPlan(**common)
    layout = distill.layout
    return TrainingPlan(
        **common,
        data=sources["distill.data"],
        teacher_correction=_correction(spec.teacher_correction, distill),
        teacher_logits=distill.teacher_logits,
        tokens=distill.tokens,
        sequence_length=distill.sequence_length,
        global_batch_size=distill.batch,
        micro_batch_size=distill.micro_batch_size or micro_batch(distill.batch, distill.sequence_length),
        phases=tuple(_phases(distill, sources, costs)),
        optimizer=distill.adamw,
        weights=distill.weights,
        loss=distill.loss,
        track=distill.track,
        seed=distill.seed,
        shuffle=distill.shuffle,
        compute_dtype=_compute(distill),
        gradient_checkpointing=distill.gradient_checkpointing or False,
        compile=distill.compile,
        layout=LayoutPlan(
            student=layout.student,
            teacher=layout.teacher or place_teacher(costs["teacher"].weight_bytes),
            cpu_offload=layout.cpu_offload,
        ),
        checkpoint=CheckpointPlan(**distill.checkpoint.model_dump() | {"every_tokens": every}),
    )


# parameters: those of `training_plan` that decide both models
def _models(
    spec: Spec,
    build: Path,
    checkpoint: Checkpoint,
    heads: Mapping[str, HeadPlan],
    layers: str,
    costs: Mapping[str, ModelCosts],
    length: int | None,
) -> dict[str, ModelPlan]:
    """Returns the plans of `teacher` and `student`, with the FLOPs of a token where sequences of `length` are trained on."""
    shared: dict[str, Any] = {"dtype": spec.teacher.dtype or checkpoint.dtype, "layers": layers}
    flops = {side: None if length is None else costs[side].forward_flops_per_token(length) for side in heads}
    on_hub = checkpoint.commit is not None and checkpoint.tower is None
    teacher = TeacherPlan(
        # What came from the Hub is found there, or in its cache, on any other machine as well.
        model=checkpoint.name if on_hub else _relative(checkpoint.folder, build),
        revision=checkpoint.commit if on_hub else None,
        flops_per_token=flops["teacher"],
        compute=spec.teacher.compute,
        head=heads["teacher"],
        **shared,
    )
    student = ModelPlan(model=STUDENT, flops_per_token=flops["student"], head=heads["student"], **shared)
    return {"teacher": teacher, "student": student}


def _held_out(evaluate: Evaluate | None, sources: Mapping[str, DataSource], every: int | None) -> HeldOutPlan | None:
    """Returns the plan of the held-out text; `every` are the tokens between two checkpoints, None where nothing is trained."""
    if evaluate is None or evaluate.held_out is None:
        return None
    source = sources["evaluate.held_out"]
    # No file has more tokens than bytes; of a data set on the Hub nothing is known.
    size = sum(file.stat().st_size for file in data_files(source)) or evaluate.max_tokens
    often = None if every is None else measure_every(every, min(size, evaluate.max_tokens))
    return HeldOutPlan(data=source, max_tokens=evaluate.max_tokens, every_tokens=evaluate.every_tokens or often)


def _checkpoint_every(distill: Distill, tokens: int) -> int:
    """Returns the tokens between two checkpoints of a training of `tokens`: as the spec says, else a fixed share of it."""
    return distill.checkpoint.every_tokens or max(1, tokens // CHECKPOINTS)


def fitted(plan: EvaluationPlan, recompute: Recomputation, micro_batches: Sequence[int]) -> EvaluationPlan:
    """The plan with what the estimate of memory has chosen: what is recomputed, and the micro batches of the plan and of
    its phases in turn."""
    if not isinstance(plan, TrainingPlan):
        return plan
    phases = tuple(
        phase.model_copy(update={"micro_batch_size": size})
        for phase, size in zip(plan.phases, micro_batches[1:], strict=True)
    )
    chosen = {"gradient_checkpointing": recompute, "micro_batch_size": micro_batches[0], "phases": phases}
    return plan.model_copy(update=chosen)


def aligned(plan: EvaluationPlan, layers: Sequence[int], coordinates: str | None) -> EvaluationPlan:
    """The plan with the pairs of layers that `pairs: all` stands for: `layers` are the teacher's that the student keeps, and
    `coordinates` is the file of the kept coordinates, None where all are kept."""
    if not isinstance(plan, TrainingPlan) or (hidden := plan.loss.hidden_states) is None:
        return plan
    if hidden.pairs == "all":
        pairs = tuple((theirs, own) for own, theirs in enumerate(layers))
        hidden = hidden.model_copy(update={"pairs": pairs})
    loss = plan.loss.model_copy(update={"hidden_states": hidden})
    kept = coordinates if hidden.coordinates == "kept" else None
    return plan.model_copy(update={"loss": loss, "kept_coordinates": kept})


def _phases(
    distill: Distill, sources: Mapping[str, DataSource], costs: Mapping[str, ModelCosts]
) -> Iterator[PhasePlan]:
    """Yields the phases, where the spec has several."""
    for number, phase in enumerate(distill.phases):
        alone = distill.alone(phase)
        length, batch = alone.sequence_length, alone.batch
        student, teacher = (costs[side].forward_flops_per_token(length) for side in ("student", "teacher"))
        yield PhasePlan(
            tokens=alone.tokens,
            sequence_length=length,
            global_batch_size=batch,
            micro_batch_size=alone.micro_batch_size or micro_batch(batch, length),
            data=sources.get(f"distill.phases.{number}.data"),
            flops_per_token=step_flops(student, teacher if distill.needs_teacher else 0),
        )


def _compute(distill: Distill) -> ComputeDtype:
    """The dtypes that the student computes in. A CPU takes fp32 for bf16, which would be slower there, and emulates float8."""
    if distill.compute == "float8":
        return ComputeDtype(cpu="float8", cuda="float8")
    return ComputeDtype(cpu="float32", cuda="bfloat16")


def _evaluation(loaded: LoadedSpec, evaluate: Evaluate) -> EvaluatePlan:
    folder = None if evaluate.data_dir is None else str((loaded.folder / evaluate.data_dir).resolve())
    return EvaluatePlan(
        suite=benchmarks(evaluate.suite),
        data_dir=folder,
        prompt=evaluate.prompt,
        continuation_tokens=evaluate.continuation_tokens,
        require=evaluate.require,
        published=evaluate.published,
    )


def _correction(correction: TeacherCorrection | None, distill: Distill) -> CorrectionPlan | None:
    if correction is None:
        return None
    return CorrectionPlan(
        tokens=correction.tokens,
        optimizer=correction.optimizer,
        every_tokens=_checkpoint_every(distill, correction.tokens),
        output=TEACHER,
        work=str(CORRECTION_WORK),
    )


def render(plan: EvaluationPlan, spec: Path, build: Path) -> str:
    """Returns the text of training.yaml."""
    body = yaml.safe_dump(to_document(plan), sort_keys=False, allow_unicode=True, width=120)
    return HEADER.format(spec=spec.name, build=build.absolute().name) + body


def _relative(folder: Path, build: Path) -> str:
    """Returns the folder relative to the build, so that both can be moved together; absolute for what lies in a
    cache."""
    relative = os.path.relpath(folder, build)
    return relative if relative.count("..") <= 4 else str(folder)
