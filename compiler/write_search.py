"""Writes BUILD/search: the candidates' pruned students, all from one calibration, and the plan of the rungs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.build_documents import is_training
from minitron.compiler.compilation import Compilation, run_buffers
from minitron.compiler.compile import (
    REFIT_DEFINITION,
    Stages,
    check_unchanged,
    prune,
    require_teacher,
    student_fingerprint,
)
from minitron.compiler.emit.coordinates import write_coordinates
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.emit.student import StudentFolder, student_tensors, write_student
from minitron.compiler.emit.training_plan import aligned, render, training_plan
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.estimate.plan_costs import plan_costs
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.out_of_memory import told_in_a_sentence
from minitron.compiler.plan.plan import Plan, settled, with_weights
from minitron.compiler.planning import SearchPlan
from minitron.compiler.recovery.refit import RIDGE
from minitron.compiler.roles.names import HIDDEN
from minitron.compiler.search.candidates import Candidate
from minitron.compiler.teacher.folder_files import copy_file, copy_tokenizer
from minitron.compiler.teacher.lock import versions
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.weights.source import open_weights
from minitron.specs.atomic import (
    atomic_folder,
    atomic_path,
    claim_folder,
    kept_folder,
    publish_folder,
    remove_leftovers,
    require_replaceable,
    write_text,
)
from minitron.specs.builds import (
    COMPILED,
    CONFIG,
    COORDINATES,
    REFITTED,
    SEARCH,
    SEARCH_PLAN,
    STAGED,
    STUDENT,
    TOKENIZER,
    TRAINING,
    WORK,
)
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

    A search of another spec, teacher or data that is there is replaced, once this one is whole. What a process that was killed
    or interrupted has calibrated, refitted and written of the same search is taken up. UsageError where a student is in
    training in the build; else errors are those of `compile_spec`.
    """
    build, loaded = search.build, search.loaded
    claim_folder(build, COMPILED, "name another with -o")
    with only_one(build, "compiling"):
        remove_leftovers(build, but=(SEARCH, REFITTED, STAGED))
        plan = with_weights(search.plan(1), progress)
        inputs = with_result(loaded, observe(at_commit(loaded, plan.checkpoint.commit)))
        before, identity = read_search(build), search_identity(loaded)
        if before is not None and (before.identity, before.inputs) == (identity, inputs):
            progress.message(f"search: the candidates in {build / SEARCH} are up to date")
            remove_leftovers(build, but=(REFITTED, STAGED))  # a compile of the best one goes on with these
            return
        if is_training(build):
            raise UsageError(
                f"{build} holds the training of a student that another search has chosen; name another folder with -o, or "
                "remove its train/ and model/"
            )
        require_replaceable(build / SEARCH)
        if before is not None:
            progress.message(f"search: {build / SEARCH} is of another spec, teacher or data, and is made again")
        try:
            with told_in_a_sentence(device, calibrates=False):
                _write(search, plan, (inputs, identity), device, progress, stages)
        except OSError:  # a full disk, say: once that is mended, candidates that are whole are not made again
            remove_leftovers(build, but=(SEARCH, REFITTED))
            raise
        except Exception:
            remove_leftovers(build)
            raise
        remove_leftovers(build)


def _write(
    search: SearchPlan, first: Plan, known: tuple[Inputs, str], device: str, progress: Progress, stages: Stages
) -> None:
    build, (inputs, identity) = search.build, known
    # Candidates that differ in their training alone share a student, and the proof that it can be built.
    shapes = {_shape(search.candidate(1)): first}
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
    folder = _Folder.opened(build, _made_for(search, known, device, scores, samples))
    students = {number: replace(compilation, plan=plan, scores=ScoreTable()) for number, plan in plans.items()}
    entries, shared = _write_candidates(search, folder, students, (scores, samples), stages)
    # One device trains all of them, and so the largest decides what is recomputed and how many sequences go through at a time.
    largest = max(search.candidates.found, key=lambda one: (one.costs.parameters, one.number)).number
    choice = Estimate(plans[largest]).candidate
    shared = shared.model_copy(
        update={"gradient_checkpointing": choice.recompute, "micro_batch_size": choice.micro_batch}
    )
    _write_tokenizer(first.checkpoint.folder, folder.search / TOKENIZER)
    write_text(folder.search / TRAINING, render(shared, search.loaded.path, build))
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
    write_model_file(folder.search / SEARCH_PLAN, document)
    publish_folder(folder.search, build / SEARCH)


@dataclass(frozen=True)
class _Folder:
    """The hidden folder in which everything is written first, and what an earlier process has completed in it.

    `search` becomes BUILD/search. Beside it is a file for each student that is written, with its fingerprint: what a refit
    has fitted is gone by then.
    """

    path: Path

    @staticmethod
    def opened(build: Path, made_for: str) -> _Folder:
        folder = _Folder(kept_folder(build / SEARCH, made_for))
        for place in (folder.search, *folder.search.glob("*")):  # of processes that were killed
            remove_leftovers(place, but=(STUDENT,))
        return folder

    @property
    def search(self) -> Path:
        return self.path / SEARCH

    def student(self, number: int) -> Path:
        return self.search / f"{number:02d}" / STUDENT

    def fingerprint(self, number: int) -> str | None:
        """The fingerprint of a student that is whole; None for one that is not."""
        note = self._note(number)
        return note.read_text(encoding="utf-8") if note.is_file() and self.student(number).is_dir() else None

    def note(self, number: int, fingerprint: str) -> None:
        """Notes that a student is whole."""
        write_text(self._note(number), fingerprint)

    def _note(self, number: int) -> Path:
        return self.path / f"{number:02d}.fingerprint"


def _write_candidates(
    search: SearchPlan,
    folder: _Folder,
    students: Mapping[int, Compilation],
    scored: tuple[ScoreTable, torch.Tensor | None],
    stages: Stages,
) -> tuple[list[CandidatePlan], TrainingPlan]:
    """Writes every student that is not there yet. Returns the candidates as search.json has them, and the training that they
    share. `students` are the compilations of the candidates, before anything is selected."""
    entries: list[CandidatePlan] = []
    shared: TrainingPlan | None = None
    written: dict[str, tuple[str, Plan, Path]] = {}
    scores, samples = scored
    progress = students[search.candidates.found[0].number].progress
    done = sum(folder.fingerprint(number) is not None for number in students)
    with progress.task("write candidates", len(students), "students", done) as task:
        for one in search.candidates.found:
            target, begun, kept = folder.student(one.number), students[one.number], None
            fingerprint, before = folder.fingerprint(one.number), written.get(_shape(one))
            known = fingerprint is not None
            if before is not None:
                fingerprint, plan, student_folder = before
                if not known:
                    with atomic_folder(target) as copy:
                        shutil.copytree(student_folder, copy, dirs_exist_ok=True)
                    if (there := student_folder.with_name(COORDINATES)).is_file():
                        with atomic_path(target.with_name(COORDINATES)) as coordinates:
                            shutil.copyfile(there, coordinates)
            elif fingerprint is not None:
                plan = settled(begun.plan, stages.select(begun.plan, scores))
            else:
                compilation, selection, student, _ = prune(begun, scores, samples, stages, begun.build)
                fingerprint, plan = student_fingerprint(compilation, selection), compilation.plan
                kept = compilation.coordinates
                _write_student(target, compilation, student, one)
            written.setdefault(_shape(one), (fingerprint, plan, target))
            entry, shared_now = _entry(one, replace(plan, loaded=begun.plan.loaded), fingerprint)
            if kept is not None and entry.kept_coordinates:
                write_coordinates(target.with_name(COORDINATES), kept)
            if not known:
                folder.note(one.number, fingerprint)
                task.advance(1)
            shared = shared or shared_now
            entries.append(entry)
    assert shared is not None, "a search has candidates"
    return entries, shared


def _made_for(
    search: SearchPlan,
    known: tuple[Inputs, str],
    device: str,
    scores: ScoreTable,
    samples: torch.Tensor | None,
) -> str:
    """A hash of everything that decides the bytes of the candidates."""
    digest = hashlib.sha256()
    shapes = [(one.number, _shape(one)) for one in search.candidates.found]
    parts = (known, shapes, REFIT_DEFINITION, RIDGE, torch.device(device).type, sorted(versions().items()))
    digest.update(repr(parts).encode())
    for name, value in sorted(scores.to_tensors().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    if samples is not None:
        digest.update(samples.numpy().tobytes())
    return digest.hexdigest()


def _shape(one: Candidate) -> str:
    return repr(sorted(one.written.items()))


def _entry(one: Candidate, plan: Plan, fingerprint: str) -> tuple[CandidatePlan, TrainingPlan]:
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
    narrows_hidden = HIDDEN in plan.targets.widths
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
        resumed=True,
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
