"""The driver: the table of contents of a compile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.compiler.build_documents import (
    Trained,
    compiled_on,
    guard_build,
    guard_training,
    renew_documents,
    require_passed,
    search_start,
    staged,
    write_documents,
    write_verification,
)
from minitron.compiler.capture.models import layer_keys
from minitron.compiler.compilation import Buffers, Compilation, Work, run_buffers, weight_hashes
from minitron.compiler.emit.model_card import model_card
from minitron.compiler.emit.program import build_program, save_program
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.emit.student import StudentFolder, student_tensors, write_student
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.graph.executor import Executor
from minitron.compiler.graph.memory import release_heap
from minitron.compiler.graph.names import Fetch, strip_wrapper
from minitron.compiler.importance.batches import batches_of
from minitron.compiler.importance.layer_order import choices
from minitron.compiler.importance.ranking import equal_scores, unreached_experts
from minitron.compiler.importance.scores import ScoreTable, WidthConfig
from minitron.compiler.importance.select import Selection, narrowing_of, select, selection_json
from minitron.compiler.out_of_memory import told_in_a_sentence
from minitron.compiler.plan.checks import teacher_key
from minitron.compiler.plan.plan import Plan, settled, with_weights
from minitron.compiler.plan_document import plan_document
from minitron.compiler.planning import make_plan
from minitron.compiler.recovery.basis import principal_weights, rotated_reference
from minitron.compiler.recovery.merged_experts import MergedExperts, merge_experts, merged_in
from minitron.compiler.recovery.merged_weights import MergedWeights, merged
from minitron.compiler.recovery.refit import RIDGE, Refit, find_stages, skipped_values
from minitron.compiler.recovery.refit_progress import RefitProgress
from minitron.compiler.recovery.refitted_weights import RefittedWeights
from minitron.compiler.recovery.rotated_weights import RotatedWeights
from minitron.compiler.rewrite import run_passes
from minitron.compiler.rewrite.drop_layers import drop_layers
from minitron.compiler.rewrite.narrow_parameters import narrow_parameters
from minitron.compiler.rewrite.scale_repair import changed_buffers, repair_scale
from minitron.compiler.rewrite.shape_constants import shape_constants
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import HIDDEN, LAYERS, NUM_EXPERTS
from minitron.compiler.score import score
from minitron.compiler.student.config_keys import config_key
from minitron.compiler.student.targets import Targets
from minitron.compiler.teacher.freshness import staleness
from minitron.compiler.teacher.lock import versions
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.teacher_checks import known_teacher, original_of
from minitron.compiler.verify.checks import Check, failed
from minitron.compiler.verify.run import CHECKED, STUDENT_CHECKS, StudentCheck, run_checks
from minitron.compiler.verify.subject import Ranking, Subject
from minitron.compiler.weights.buffers import load_buffers
from minitron.compiler.weights.recipes import recipes
from minitron.compiler.weights.source import WeightSource, open_weights
from minitron.specs.atomic import claim_folder, kept_folder, remove_leftovers, temporary_path
from minitron.specs.builds import (
    COMPILED,
    PLAN,
    PROGRAM,
    REFITTED,
    STAGED,
    STUDENT,
    TRAINING,
    read_document,
)
from minitron.specs.errors import Refused, UsageError, WorkError, placing
from minitron.specs.file_hashes import folder_hashes
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import Inputs, changes
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress


def _check_ranking(plan: Plan, scores: ScoreTable, selection: Selection, progress: Progress) -> None:
    """Refuses a selection by scores that are all equal, and tells of experts that no token was sent to."""
    importance, roles = plan.loaded.spec.importance, plan.teacher.roles
    if plan.rotates:  # the leading components stay, whatever the channels' scores are
        selection = replace(selection, hidden=None)
    width = WidthConfig(importance.width.batch, importance.width.sequence)
    with placing(plan.loaded):
        if found := equal_scores(scores, plan.targets, selection, width, plan.teacher.captured.layer_count):
            raise Refused(found)
    if message := unreached_experts(scores, selection, roles):
        progress.message(message)
    if message := _other_layers(plan, scores, selection):
        progress.message(message)


def _other_layers(plan: Plan, scores: ScoreTable, selection: Selection) -> str | None:
    """A sentence on layers that scored highest and cannot be kept."""
    if not plan.rank_layers or scores.layers is None:
        return None
    depth = plan.loaded.spec.importance.depth
    highest = next(choices(scores.layers, plan.targets.layers, contiguous=depth.contiguous))
    if highest == selection.layers or (error := plan.proofs.refusal(highest)) is None:
        return None
    first, stay = (", ".join(map(str, layers)) for layers in (highest, selection.layers))
    return f"layers {first} score highest and cannot be kept ({error}); layers {stay} stay"


def rotate(
    compilation: Compilation, selection: Selection, scores: ScoreTable, samples: torch.Tensor | None
) -> tuple[Compilation, Selection]:
    """Rotates the teacher to the principal components of its residual stream and selects the leading ones."""
    rotation, width = compilation.plan.rotation, compilation.plan.targets.widths[HIDDEN]
    assert rotation is not None and samples is not None
    source = principal_weights(compilation.source, rotation, scores, samples, width)
    return replace(compilation, source=source), replace(selection, hidden=np.arange(width))


def merge(compilation: Compilation, selection: Selection, scores: ScoreTable) -> Compilation:
    """Folds dropped heads and experts into kept ones, where the spec asks for it."""
    plan, source = compilation.plan, compilation.source
    teacher = plan.teacher
    if plan.merges:
        source = merged(source, teacher.table, teacher.roles, scores, selection)
    if plan.merges_experts:
        count = len(selection.widths[NUM_EXPERTS])
        with compilation.progress.task("merge experts", count, "layers") as task:
            source = merge_experts(source, teacher, scores, selection, task)
    return replace(compilation, source=source)


def rewrite(plan: Plan, selection: Selection, buffers: Buffers) -> RewrittenStudent:
    """Runs the graph passes in order and makes the recipes of the student's parameters."""
    teacher, captured = plan.teacher, plan.teacher.captured
    narrowing = narrowing_of(selection, teacher.roles, teacher.table)
    dims_of = {node.name: dims for node, dims in teacher.table.nodes.items()}
    passes = [narrow_parameters(dims_of, narrowing), shape_constants(dims_of, narrowing)]
    if len(selection.layers) < captured.layer_count:
        passes.insert(0, drop_layers(captured, teacher.ends, selection.layers))
    graph_module = run_passes(captured.graph_module, passes)
    made = recipes(captured, teacher.table.parameters, narrowing, selection.layers)
    own = run_buffers(plan, plan.config)
    numbers = {old: new for new, old in enumerate(selection.layers)}
    # A buffer that only dropped layers read (that of the only layer of its kind) is no longer needed.
    read = {strip_wrapper(str(node.target)) for node in graph_module.graph.nodes if node.op == "get_attr"}
    changed = {
        name: source for name, source in changed_buffers(captured, buffers, own, numbers).items() if name in read
    }
    with placing(plan.loaded, "student"):
        for name, source in changed.items():
            old, new = buffers[source], own.get(name)
            if new is None or old.numel() != 1:
                raise UsageError(
                    f"{name} is computed from a narrowed width when the student is loaded; no repair is known"
                )
            repair_scale(graph_module, name, float(old) / float(new), made)
    return RewrittenStudent(graph_module, made, narrowing, own, bool(changed))


def refit(
    compilation: Compilation,
    selection: Selection,
    student: RewrittenStudent,
    samples: torch.Tensor | None,
    target: Path,
) -> Compilation:
    """Refits the student's projections to the teacher's outputs on the calibration data. The temporary folder of `target` holds
    the fitted values, and those of a process that was killed at the same."""
    teacher, source, settings = compilation.plan.teacher, compilation.source, compilation.settings
    assert samples is not None
    folder = kept_folder(target, _refit_identity(compilation, selection, samples))
    captured, whole = teacher.captured, teacher.captured.graph_module
    theirs = source.source if isinstance(source, MergedExperts) else source
    fetch: Fetch = theirs.get
    if isinstance(theirs, RotatedWeights):
        assert compilation.plan.rotation is not None
        whole, fetch = rotated_reference(whole, teacher.table, theirs, compilation.plan.rotation.tied)
    by_source = {recipe.source: recipe for recipe in student.recipes.values()}
    names = {name: recipe.source for name, recipe in student.recipes.items()}
    refitted = RefittedWeights(source, by_source, folder / "values")
    work = Refit(
        Executor(whole, captured.layer_of, fetch, compilation.buffers, settings),
        Executor(
            student.graph_module, captured.layer_of, lambda name: refitted.narrowed(names[name]), student.buffers, settings
        ),
        fetch,
        refitted,
        student.narrowing.kept.get(teacher.roles.hidden.leaf),
        skipped_values(teacher.ends, compilation.plan.layers),
    )  # fmt: skip
    stages = find_stages(teacher.table, teacher.roles, student.narrowing, set(by_source))
    batches, block = batches_of(samples, teacher.roles.hidden.size)
    done = sum(map(work.known, stages))
    with compilation.progress.task("refit", len(stages), "stages", done) as task:
        work.run(stages, batches[:block], task, RefitProgress(folder / "streams.safetensors"))
    return replace(compilation, source=refitted)


def emit(compilation: Compilation, student: RewrittenStudent) -> None:
    """Writes student/, unless a process that was killed has."""
    plan = compilation.plan
    if (compilation.build / STUDENT).is_dir() and compilation.staging is not None:
        compilation.progress.message("student: written by a compile that was interrupted")
        return
    tensors = student_tensors(compilation.source, student.recipes, plan.teacher.captured.stored_dtype)
    folder = StudentFolder(plan.config, plan.model, plan.dtype, plan.checkpoint.folder, _card(compilation))
    target, resumed = compilation.build / STUDENT, compilation.staging is not None
    if resumed and (files := list(temporary_path(target).glob("*.safetensors"))):
        compilation.progress.message(
            f"student: {len(files)} of its files were written by a compile that was interrupted"
        )
    with compilation.progress.task("write student", Estimate(plan).student_costs.weight_bytes, "B") as task:
        write_student(target, folder, tensors, task.advance, resumed=resumed)
    release_heap()


def write_program(compilation: Compilation, student: RewrittenStudent) -> None:
    """Writes student.pt2, unless a process that was killed has."""
    if (compilation.build / PROGRAM).is_file() and compilation.staging is not None:
        return
    program = build_program(student.graph_module, load_buffers(compilation.plan.model))
    save_program(program, compilation.build / PROGRAM)


def select_by_scores(plan: Plan, scores: ScoreTable) -> Selection:
    """Selects the highest-scored indices of every axis, and of layers the highest-scored that can be kept."""
    contiguous, count = plan.loaded.spec.importance.depth.contiguous, plan.teacher.captured.layer_count
    layers = None
    if plan.rank_layers:
        layers = plan.proofs.highest(scores, contiguous=contiguous) or plan.layers
    return select(plan.targets, plan.teacher.roles, scores, count, contiguous=contiguous, layers=layers)


def verify(
    compilation: Compilation,
    student: RewrittenStudent,
    samples: torch.Tensor | None,
    wanted: Sequence[StudentCheck] = STUDENT_CHECKS,
    recorded: Mapping[str, str] | None = None,
) -> list[Check]:
    """Runs the `wanted` checks on the build as it was written; `recorded` are the hashes of student/'s files, where its
    compile has ended."""
    plan, importance = compilation.plan, compilation.plan.loaded.spec.importance
    subject = Subject(
        compilation.build,
        original_of(compilation),
        student,
        plan.config,
        plan.model,
        config_widths(plan.teacher, plan.targets, plan.config),
        (read_document(compilation.build / PLAN) or {})["selection"],
        Ranking(compilation.scores, plan.targets, importance.depth.contiguous, plan.rotates, plan.proofs.possible)
        if importance.selection == "scores"
        else None,
        recorded,
        compilation.coordinates,
        any(one.axis == LAYERS and one.status != "exact" for one in plan.targets.statuses),
        plan.rotation,
    )
    kept = None if compilation.staging is None else compilation.staging / CHECKED
    return run_checks(subject, samples, compilation.progress, wanted, kept)


@dataclass(frozen=True)
class Stages:
    """The stages of a compile after the plan. Tests and experiments replace one and keep the driver."""

    verify_teacher: Callable[[Compilation], list[Check]] = known_teacher
    score: Callable[[Compilation], tuple[ScoreTable, torch.Tensor | None]] = score
    select: Callable[[Plan, ScoreTable], Selection] = select_by_scores
    rewrite: Callable[[Plan, Selection, Buffers], RewrittenStudent] = rewrite
    emit: Callable[[Compilation, RewrittenStudent], None] = emit
    write_program: Callable[[Compilation, RewrittenStudent], None] = write_program
    verify: Callable[[Compilation, RewrittenStudent, torch.Tensor | None], list[Check]] = verify


def compile_spec(
    loaded: LoadedSpec,
    build: Path,
    *,
    device: str,
    progress: Progress,
    plan: Plan | None = None,
    stages: Stages = Stages(),
    work: Work = Work(),
) -> Plan:
    """Compiles a spec into the build folder: scores, student, program, verification, training plan.

    `plan` is that of `make_plan(loaded, build=build, weights=True)`, where it was made already; `work` what the compile
    may take. Of several processes all calibrate, and the first does the rest. Every error of the spec is found before
    weights are fetched, and everything that the build itself stands against before anything is written. Where only the
    training plan changed, the student stays, and plan.json and training.yaml are renewed.

    Raises SpecInvalid and UsageError for a wrong spec, and UsageError where
    another process is compiling into the folder; raises WorkError where the work fails, also where a check of the
    student does not pass.
    """
    plan, ranks = plan or make_plan(loaded, build=build, weights=True), work.ranks
    if not ranks.leads:
        if ranks.from_leader(None):
            with told_in_a_sentence(device):
                stages.score(_open(with_weights(plan, progress), device, progress, work))
        return plan
    claim_folder(build, COMPILED, "name another with -o")
    with only_one(build, "compiling"):
        remove_leftovers(build, but=() if work.fresh else (STAGED, REFITTED))
        found = staleness(build, loaded)
        guard_build(plan, found)
        renewed = not work.fresh and found is not None and not found.student and renew_documents(plan, _inputs(plan))
        ranks.from_leader(not renewed)
        if renewed:
            remove_leftovers(build)
            progress.message(f"{build / STUDENT} is what the spec asks for; {TRAINING} and {PLAN} are renewed")
            return plan
        plan = with_weights(plan, progress)
        try:
            with told_in_a_sentence(device):
                compiled = _compile(_open(plan, device, progress, work), stages)
        except OSError:  # a full disk, say: once that is mended, the refit goes on
            remove_leftovers(build, but=(REFITTED,))
            raise
        except Exception:
            remove_leftovers(build)
            raise
        remove_leftovers(build)
        return compiled


def _open(plan: Plan, device: str, progress: Progress, work: Work) -> Compilation:
    """The state in which a compile begins."""
    source = open_weights(plan.teacher.captured, plan.checkpoint)
    return Compilation(plan, source, run_buffers(plan, plan.teacher.captured.config), device, progress, work=work)


def _compile(compilation: Compilation, stages: Stages) -> Plan:
    """Writes everything in the build folder while this process holds the folder's lock."""
    plan = compilation.plan
    build = plan.build
    inputs = _inputs(plan)
    of_teacher = require_teacher(compilation, stages)
    scores, samples = stages.score(compilation)
    compilation, selection, student, _ = prune(compilation, scores, samples, stages, build)
    del scores  # with their covariance, which is as large as the largest matrices
    plan, fingerprint = compilation.plan, student_fingerprint(compilation, selection)
    guard_training(build, fingerprint)
    with staged(build, _identity(compilation, fingerprint)) as folder:
        compilation = replace(compilation, staging=folder)
        stages.emit(compilation, student)
        stages.write_program(compilation, student)
        start = search_start(plan, fingerprint)
        write_documents(folder, plan, selection, Trained(fingerprint, inputs, start), compilation.coordinates)
        checks = [*of_teacher, *stages.verify(compilation, student, samples)]
        check_unchanged(inputs, _inputs(plan))
        write_verification(folder, checks, folder_hashes(folder / STUDENT), compiled_on(compilation.device))
    require_passed(checks)
    return plan


def _identity(compilation: Compilation, fingerprint: str) -> str:
    """Identifies everything that is written of a student, and what checks it."""
    plan = compilation.plan
    checks = [check.__name__ for check in STUDENT_CHECKS]
    parts = (fingerprint, _card(compilation), repr(sorted(versions().items())), repr(checks), compilation.device)
    document = json.dumps(plan_document(plan), sort_keys=True, default=str)
    return hashlib.sha256("\n".join((*parts, document)).encode()).hexdigest()


def _card(compilation: Compilation) -> str:
    return model_card(plan_document(compilation.plan), compilation.plan.checkpoint.folder)


def require_teacher(compilation: Compilation, stages: Stages) -> list[Check]:
    """Runs the checks of the teacher. Raises SpecInvalid at the teacher's line where one fails."""
    loaded, checks = compilation.plan.loaded, stages.verify_teacher(compilation)
    with placing(loaded, teacher_key(loaded)):
        for check in failed(checks):
            raise UsageError(f"cannot be compiled: {check.detail}")
    return checks


def prune(
    compilation: Compilation, scores: ScoreTable, samples: torch.Tensor | None, stages: Stages, scratch: Path
) -> tuple[Compilation, Selection, RewrittenStudent, WeightSource]:
    """Selects what stays and rewrites the teacher's graph to the student's. The compilation that comes back has the weights
    that the student is cut from; the source at the end those before heads were merged and projections refitted. `scratch`
    is the folder in which a refit has a folder."""
    plan = compilation.plan
    selection = stages.select(plan, scores)
    _check_ranking(plan, scores, selection, compilation.progress)
    if plan.rotates:
        compilation, selection = rotate(compilation, selection, scores, samples)
    plan = settled(plan, selection)
    rotated = compilation.source
    kept = kept_coordinates(plan, selection, rotated)
    compilation = replace(compilation, plan=plan, scores=replace(scores, covariance={}), coordinates=kept)
    compilation = merge(compilation, selection, scores)
    student = stages.rewrite(plan, selection, compilation.buffers)
    if plan.refits:
        compilation = refit(compilation, selection, student, samples, scratch / REFITTED)
    return compilation, selection, student, rotated


# Part of what identifies a refit: another one where the same inputs give other values.
REFIT_DEFINITION = "ridge of the mean diagonal, a block of rows at a time"


def _refit_identity(compilation: Compilation, selection: Selection, samples: torch.Tensor) -> str:
    """A hash of everything that decides the fitted values."""
    parts = (
        student_fingerprint(compilation, selection),
        REFIT_DEFINITION,
        repr(RIDGE),
        hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
        torch.device(compilation.device).type,
        repr(sorted(versions().items())),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _inputs(plan: Plan) -> Inputs:
    """Observes what the result depends on beside the spec, at the commit that was planned."""
    return with_result(plan.loaded, observe(at_commit(plan.loaded, plan.checkpoint.commit)))


def kept_coordinates(plan: Plan, selection: Selection, source: WeightSource) -> torch.Tensor | None:
    """Returns what the student keeps of the teacher's hidden states: the channels [width], or the components [teacher's width,
    width]; None where it keeps all. `source` holds the weights that the student was cut from."""
    if selection.hidden is None:
        return None
    kept = torch.from_numpy(selection.hidden)
    return source.basis[:, kept].float() if isinstance(source, RotatedWeights) else kept


def config_widths(teacher: AnalysedTeacher, targets: Targets, config: Any) -> dict[str, int]:
    """Maps key of the student's configuration to width, for everything that the spec asks for."""
    keys = {name: config_key(teacher.captured.config, name, teacher.widths[name]) for name in targets.widths}
    attribute_map = getattr(config, "attribute_map", {})
    wanted = {attribute_map.get(key, key): targets.widths[name] for name, key in keys.items() if key is not None}
    (layers, *_) = (attribute_map.get(key, key) for key in layer_keys(config))
    if layers in config.to_dict():  # else the length of a list over layers says it
        wanted[layers] = targets.layers
    return wanted


def check_unchanged(before: Inputs, now: Inputs) -> None:
    """Raises WorkError where an input of the spec changed during the compile: the student belongs to neither
    version."""
    for path, _, _ in changes(before, now):
        raise WorkError(f"{' '.join(path)} changed while the student was compiled; let it rest and compile again")


def student_fingerprint(compilation: Compilation, selection: Selection) -> str:
    """Identifies the pruned student: the contents of its teacher, wherever it lies, basis, selection and dtype."""
    plan, source = compilation.plan, compilation.source
    parts = (
        repr(weight_hashes(plan.checkpoint)),
        (plan.checkpoint.tied_config or plan.checkpoint.config).to_json_string(),
        json.dumps(selection_json(selection, plan.teacher.roles)),
        plan.config.to_json_string(),
        str(plan.dtype),
        source.digest() if isinstance(source, RotatedWeights | RefittedWeights | MergedWeights | MergedExperts) else "",
        *((experts.digest(),) if (experts := merged_in(source)) is not None and experts is not source else ()),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
