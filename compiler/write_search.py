"""Writes BUILD/search: the candidates' pruned students, all from one calibration, and the plan of the rungs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.build_documents import is_training
from minitron.compiler.compilation import Compilation, run_buffers
from minitron.compiler.compile import Stages, check_unchanged, prune, require_teacher, student_fingerprint
from minitron.compiler.emit.coordinates import write_coordinates
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.emit.student import StudentFolder, student_tensors, write_student
from minitron.compiler.emit.training_plan import aligned, render, training_plan
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.estimate.plan_costs import plan_costs
from minitron.compiler.plan.plan import Plan, with_weights
from minitron.compiler.planning import SearchPlan
from minitron.compiler.search.candidates import Candidate
from minitron.compiler.teacher.folder_files import copy_file, copy_tokenizer
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.weights.source import open_weights
from minitron.specs.atomic import atomic_folder, claim_folder, remove_leftovers, write_text
from minitron.specs.builds import COMPILED, CONFIG, COORDINATES, SEARCH, SEARCH_PLAN, STUDENT, TOKENIZER, TRAINING, WORK
from minitron.specs.errors import UsageError
from minitron.specs.lockfile import Inputs
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress
from minitron.specs.search_files import (
    CandidatePlan,
    RungPlan,
    SearchFile,
    read_search,
    search_identity,
    write_model_file,
)
from minitron.specs.training_plan import TrainingPlan

JUDGED_SHARE = 0.25  # of the first rung's tokens: so that judging costs little beside training
LEAST_JUDGED = 16  # sequences


def write_search(search: SearchPlan, *, device: str, progress: Progress, stages: Stages = Stages()) -> None:
    """Writes the candidates of a search into its build folder; does nothing where they are written, or their rungs done.

    A search of another spec, teacher or data that is there is replaced. UsageError where a student is in training in the
    build; else errors are those of `compile_spec`.
    """
    build, loaded = search.build, search.loaded
    claim_folder(build, COMPILED, "name another with -o")
    with only_one(build, "compiling"):
        remove_leftovers(build)
        plan = with_weights(search.plan(1), progress)
        inputs = with_result(loaded, observe(at_commit(loaded, plan.checkpoint.commit)))
        before, identity = read_search(build), search_identity(loaded)
        if before is not None and (before.identity, before.inputs) == (identity, inputs):
            progress.message(f"search: the candidates in {build / SEARCH} are up to date")
            return
        if is_training(build):
            raise UsageError(
                f"{build} holds the training of a student that another search has chosen; name another folder with -o, or "
                "remove its train/ and model/"
            )
        if before is not None:
            progress.message(f"search: {build / SEARCH} is of another spec, teacher or data, and is made anew")
        shutil.rmtree(build / SEARCH, ignore_errors=True)
        claim_folder(build / SEARCH, (), "name another with -o")
        with tempfile.TemporaryDirectory(dir=build, prefix=".refit.", suffix=".tmp") as scratch:
            _write(search, plan, (inputs, identity), device, progress, stages, Path(scratch))


# parameters: what the stages of a compile share, before there is a compilation
def _write(
    search: SearchPlan,
    first: Plan,
    known: tuple[Inputs, str],
    device: str,
    progress: Progress,
    stages: Stages,
    scratch: Path,
) -> None:
    build, (inputs, identity) = search.build, known
    # Candidates that differ in their training alone share a student, and the proof that it can be built.
    shapes: dict[str, Plan] = {}
    for one in search.candidates.found:
        if _shape(one) not in shapes:
            shapes[_shape(one)] = replace(search.plan(one.number), checkpoint=first.checkpoint)
    plans = {
        one.number: replace(shapes[_shape(one)], loaded=one.spec(search.loaded, search.candidates.first_rung))
        for one in search.candidates.found
    }
    source = open_weights(first.teacher.captured, first.checkpoint)
    buffers = run_buffers(first, first.teacher.captured.config)
    # Layers are ranked in the same pass where any candidate drops some; one after the other as many as any of them drops.
    ranked = [plan for plan in plans.values() if plan.rank_layers]
    scored = max(ranked, key=lambda plan: plan.layers_one_by_one, default=None)
    scored = scored or next((plan for plan in plans.values() if plan.needs_scores), first)
    compilation = Compilation(scored, source, buffers, device, progress)
    require_teacher(compilation, stages)
    scores, samples = stages.score(compilation)
    entries: list[CandidatePlan] = []
    shared: TrainingPlan | None = None
    written: dict[str, tuple[str, Plan, Path, torch.Tensor | None]] = {}
    with progress.task("write candidates", len(plans), "students") as task:
        for one in search.candidates.found:
            target = build / SEARCH / f"{one.number:02d}" / STUDENT
            if _shape(one) in written:
                fingerprint, plan, student_folder, kept = written[_shape(one)]
                with atomic_folder(target) as copy:
                    shutil.copytree(student_folder, copy, dirs_exist_ok=True)
            else:
                folder = scratch / str(one.number)
                folder.mkdir()
                started = Compilation(plans[one.number], source, buffers, device, progress)
                compilation, selection, student, _ = prune(started, scores, samples, stages, folder)
                fingerprint, plan = student_fingerprint(compilation, selection), compilation.plan
                _write_student(target, compilation, student, one)
                shutil.rmtree(folder)
                kept = compilation.coordinates
                written[_shape(one)] = fingerprint, plan, target, kept
            plan = replace(plan, loaded=plans[one.number].loaded)
            entry, shared_now = _entry(one, plan, fingerprint, narrows_hidden=kept is not None)
            write_coordinates(target.parent / COORDINATES, kept if entry.kept_coordinates else None)
            shared = shared or shared_now
            entries.append(entry)
            task.advance(1)
    assert shared is not None, "a search has candidates"
    # One device trains all of them, and so the largest decides what is recomputed and how many sequences go through at a time.
    largest = max(search.candidates.found, key=lambda one: (one.costs.parameters, one.number)).number
    choice = Estimate(plans[largest]).candidate
    shared = shared.model_copy(
        update={"gradient_checkpointing": choice.recompute, "micro_batch_size": choice.micro_batch}
    )
    _write_tokenizer(first.checkpoint.folder, build / SEARCH / TOKENIZER)
    write_text(build / SEARCH / TRAINING, render(shared, search.loaded.path, build))
    check_unchanged(inputs, with_result(search.loaded, observe(at_commit(search.loaded, first.checkpoint.commit))))
    document = SearchFile(
        identity=identity,
        inputs=_plain(inputs),
        candidates=tuple(entries),
        rungs=tuple(
            RungPlan(number=rung.number, tokens=rung.tokens, enter=rung.enter, leave=rung.leave)
            for rung in search.candidates.rungs
        ),
        judged_tokens=_judged_tokens(search, shared.sequence_length),
    )
    write_model_file(build / SEARCH / SEARCH_PLAN, document)


def _shape(one: Candidate) -> str:
    return repr(sorted(one.written.items()))


def _entry(one: Candidate, plan: Plan, fingerprint: str, *, narrows_hidden: bool) -> tuple[CandidatePlan, TrainingPlan]:
    """Returns a candidate as search.json has it, and its training as if it stood alone, with paths from BUILD/search."""
    teacher, student = plan_costs(plan)
    costs: Mapping[str, ModelCosts] = {"teacher": teacher, "student": student}
    training = training_plan(
        plan.loaded,
        plan.build / SEARCH,
        plan.checkpoint,
        plan.heads,
        plan.teacher.captured.layer_path,
        fingerprint,
        costs,
    )
    assert isinstance(training, TrainingPlan), "a search distils"
    own = aligned(training, plan.layers, f"{one.number:02d}/{COORDINATES}" if narrows_hidden else None)
    assert isinstance(own, TrainingPlan)
    entry = CandidatePlan(
        number=one.number,
        fingerprint=fingerprint,
        figures=one.to_json(),
        parameters=student.parameters,
        optimizer=training.optimizer,
        global_batch_size=training.global_batch_size,
        hidden_states=own.loss.hidden_states,
        kept_coordinates=own.kept_coordinates,
    )
    changes: dict[str, Any] = {
        "student": training.student.model_copy(update={"model": f"{entry.folder}/{STUDENT}"}),
        "tokenizer": TOKENIZER,
        "work": f"../{WORK}",
    }
    if (correction := training.teacher_correction) is not None:  # as the winner's training will find it
        places = {"output": f"../{correction.output}", "work": f"../{correction.work}"}
        changes["teacher_correction"] = correction.model_copy(update=places)
    return entry, training.model_copy(update=changes)


def _write_student(target: Path, compilation: Compilation, student: RewrittenStudent, one: Candidate) -> None:
    plan = compilation.plan
    write_student(
        target,
        StudentFolder(
            plan.config,
            plan.model,
            plan.dtype,
            plan.checkpoint.folder,
            f"Candidate {one.number} of a search; not verified.\n",
        ),
        student_tensors(compilation.source, student.recipes, plan.teacher.captured.stored_dtype),
        lambda _: None,
    )


def _write_tokenizer(teacher: Path, target: Path) -> None:
    """Copies the teacher's tokenizer: the candidates' own copies go with them."""
    with atomic_folder(target) as folder:
        copy_tokenizer(teacher, folder)
        copy_file(teacher / CONFIG, teacher, folder)


def _judged_tokens(search: SearchPlan, length: int) -> int:
    evaluate = search.loaded.spec.evaluate
    assert evaluate is not None, "a rule of the language"
    return min(evaluate.max_tokens, max(LEAST_JUDGED * length, int(JUDGED_SHARE * search.candidates.first_rung)))


def _plain(inputs: Inputs) -> dict[str, Any]:
    return dict(inputs)
