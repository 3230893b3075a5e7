"""The driver: the table of contents of a compile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import build_meta, stored_tensors
from minitron.compiler.emit.model_card import model_card
from minitron.compiler.emit.program import build_program, holds_custom, save_program
from minitron.compiler.emit.student import student_weights, write_student
from minitron.compiler.emit.training_plan import render, training_plan
from minitron.compiler.graph.executor import Executor, Settings
from minitron.compiler.graph.names import Fetch
from minitron.compiler.importance.calibrate import calibrate
from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.compiler.importance.scores import ScoreTable, WidthConfig
from minitron.compiler.importance.select import Selection, narrowing_of, select
from minitron.compiler.importance.taps import CalibrationConfig, DepthConfig
from minitron.compiler.plan.plan import Plan, make_plan, settled, with_weights
from minitron.compiler.recovery.basis import principal_weights, rotated_reference
from minitron.compiler.recovery.rotated_weights import RotatedWeights
from minitron.compiler.rewrite import run_passes
from minitron.compiler.rewrite.drop_layers import drop_layers
from minitron.compiler.rewrite.narrow_parameters import narrow_parameters
from minitron.compiler.rewrite.scale_repair import changed_buffers, repair_scale
from minitron.compiler.rewrite.shape_constants import shape_constants
from minitron.compiler.roles.names import HIDDEN, LAYERS
from minitron.compiler.student.config_keys import config_key
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.compiler.verify import checks as verify
from minitron.compiler.verify.masked_reference import masked_reference
from minitron.compiler.weights.buffers import load_buffers
from minitron.compiler.weights.recipes import Recipe, recipes
from minitron.compiler.weights.source import WeightSource, open_weights
from minitron.specs.atomic import atomic_path, remove_leftovers, write_text
from minitron.specs.builds import MODEL, PARTIAL_SCORES, PLAN, PROGRAM, SCORES, STUDENT, TRAINING, VERIFICATION, WORK
from minitron.specs.data_files import content_hash, resolve
from minitron.specs.errors import SpecInvalid, UsageError, WorkError, placing
from minitron.specs.file_hashes import file_hash
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import Inputs, changes
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress

Buffers = Mapping[str, torch.Tensor]
# What graphs are run in, whatever the checkpoint's number format is: scores and comparisons are not rounded.
RUN_DTYPE = torch.float32
# The largest difference of logits, over the largest logit, that a rotation in float32 may make.
ROTATION_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Student:
    """The rewritten graph, how each of its parameters is made, and the tables that the student's own code computes when it
    is loaded in RUN_DTYPE."""

    graph_module: GraphModule
    recipes: Mapping[str, Recipe]
    narrowing: Narrowing
    buffers: Buffers
    repaired: bool


def compile_spec(
    loaded: LoadedSpec,
    build: Path,
    *,
    device: str,
    progress: Progress,
    plan: Plan | None = None,
    selection: Selection | None = None,
) -> Plan:
    """Compiles a spec into the build folder: scores, student, program, verification, training plan.

    `plan` is that of `make_plan(loaded, build=build, weights=True)`, where it was made already. Everything that can be
    wrong with the spec is known before weights are fetched. `selection` is taken instead of one by scores, for
    experiments. SpecInvalid and UsageError for a wrong spec, and where another process is compiling into the folder;
    WorkError where the work fails; a check of the student that does not pass is such a failure.
    """
    plan = plan or make_plan(loaded, build=build, weights=True)
    with only_one(build, "compiling"):
        return _compile(loaded, with_weights(plan, progress), build, device, progress, selection)


def _compile(
    loaded: LoadedSpec, plan: Plan, build: Path, device: str, progress: Progress, selection: Selection | None
) -> Plan:
    """What is made in the build folder, which nobody else writes to in the meantime."""
    inputs = with_result(loaded, observe(at_commit(loaded, plan.checkpoint.commit)))
    remove_leftovers(build)
    source = open_weights(plan.captured, plan.checkpoint)
    buffers = _run_buffers(plan, plan.captured.config)
    teacher, scores, samples = source, ScoreTable(), None
    if selection is None or plan.rotates:
        scores, samples = score(plan, source, buffers, device, progress)
    if selection is None:
        selection = select(
            plan.targets,
            plan.roles,
            scores,
            plan.captured.layer_count,
            contiguous=loaded.spec.importance.depth.contiguous,
        )
    if plan.rotates:
        assert plan.rotation is not None and samples is not None
        width = plan.targets.widths[HIDDEN]
        source = principal_weights(teacher, plan.rotation, scores, samples, width)
        selection = replace(selection, hidden=np.arange(width))  # the leading components
    plan = settled(plan, selection)
    student = rewrite(plan, selection, buffers)
    fingerprint = _fingerprint(plan, selection, inputs, source)
    _guard_training(build, fingerprint)
    (build / VERIFICATION).unlink(missing_ok=True)
    emit(plan, student, source, build, progress)
    write_training_plan(plan, build, fingerprint)
    write_text(build / PLAN, _json(plan.to_json(selection) | {"fingerprint": fingerprint, "inputs": inputs}))
    checks = validate(plan, student, source, buffers, build, samples, device, progress)
    if isinstance(source, RotatedWeights):
        checks.append(check_rotation(plan, teacher, source, buffers, samples, device))
    _check_unchanged(inputs, with_result(loaded, observe(at_commit(loaded, plan.checkpoint.commit))))
    document = {
        "format_version": 1,
        "passed": not verify.failed(checks),
        "checks": [check.to_json() for check in checks],
    }
    write_text(build / VERIFICATION, _json(document))
    if verify.failed(checks):
        raise WorkError(
            f"the student failed its check {verify.failed(checks)[0]}; verification.json has all of them. "
            "Please report this: the student must not be used"
        )
    return plan


def score(
    plan: Plan, source: WeightSource, buffers: Buffers, device: str, progress: Progress
) -> tuple[ScoreTable, torch.Tensor | None]:
    """The importance scores, from the build folder where they were made from the same teacher, data and settings."""
    importance = plan.loaded.spec.importance
    if importance.data is None or not plan.needs_scores:
        return ScoreTable(), None
    try:
        tokenizer = load_tokenizer(plan.checkpoint.folder)
    except UsageError as error:
        at = "teacher.model" if plan.loaded.spec.teacher.spec is None else "teacher.spec"
        raise SpecInvalid([plan.loaded.error(at, str(error))]) from None
    with placing(plan.loaded):
        data = resolve(importance.data, plan.loaded.folder, at="importance.data")
    length = plan.captured.length or importance.data.sequence_length
    wanted = SampleConfig(importance.data.samples * (importance.data.sequence_length // length), length)
    samples = calibration_samples(data, tokenizer, plan.captured.config.vocab_size, wanted)
    if len(samples) < wanted.samples:
        progress.message(f"the calibration data makes {len(samples)} samples, not {wanted.samples}")
    need_layers = plan.targets.named_layers is None and plan.targets.layers < plan.captured.layer_count
    config = CalibrationConfig(
        WidthConfig(importance.width.batch, importance.width.sequence),
        DepthConfig(importance.depth.metric),
        () if plan.rotation is None else plan.rotation.sites,
        None if plan.rotation is None else plan.rotation.head_site,
    )
    key = _score_key(plan, content_hash(data), samples, config)
    path = plan.build / SCORES
    cached = _read_scores(path, key)
    if cached is not None and (cached.layers is not None or not need_layers):
        progress.message(f"scores: taken from {path}")
        return cached, samples
    executor = Executor(
        plan.captured.graph_module, plan.captured.layer_of, source.get, buffers, _settings(plan, device)
    )
    scores = calibrate(
        plan.captured, plan.table, plan.roles, plan.ends, executor, samples, config,
        need_layers=need_layers, partial=plan.build / PARTIAL_SCORES, key=key, progress=progress,
    )  # fmt: skip
    _write_scores(path, key, scores)
    return scores, samples


def rewrite(plan: Plan, selection: Selection, buffers: Buffers) -> Student:
    """The graph passes, in order, and the recipes of the student's parameters."""
    captured = plan.captured
    narrowing = narrowing_of(selection, plan.roles, plan.table)
    dims_of = {node.name: dims for node, dims in plan.table.nodes.items()}
    passes = [narrow_parameters(captured, dims_of, narrowing), shape_constants(dims_of, narrowing)]
    if len(selection.layers) < captured.layer_count:
        passes.insert(0, drop_layers(captured, plan.ends, selection.layers))
    graph_module, _ = run_passes(captured.graph_module, passes)
    made = recipes(captured, plan.table.parameters, narrowing, selection.layers)
    own = _run_buffers(plan, plan.config)
    numbers = {old: new for new, old in enumerate(selection.layers)}
    changed = changed_buffers(captured, buffers, own, numbers)
    try:
        for name in changed:
            old, new = buffers.get(name), own.get(name)
            if old is None or new is None or old.numel() != 1:
                raise UsageError(
                    f"{name} is computed from a narrowed width when the student is loaded; no repair is known"
                )
            repair_scale(graph_module, name, float(old) / float(new), made)
    except UsageError as error:
        raise SpecInvalid([plan.loaded.error("student", str(error))]) from None
    return Student(graph_module, made, narrowing, own, bool(changed))


def emit(plan: Plan, student: Student, source: WeightSource, build: Path, progress: Progress) -> None:
    """student/ and student.pt2."""
    make = student_weights(source, student.recipes, plan.captured.number_format)
    with progress.task("write student", plan.student_costs.weight_bytes, "B") as task:
        write_student(
            build / STUDENT, plan.config, plan.model, make,
            streamed=source.streamed, dtype=plan.dtype, teacher_folder=plan.checkpoint.folder,
            card=model_card(plan.to_json()), advance=task.advance,
        )  # fmt: skip
    save_program(build_program(student.graph_module, load_buffers(plan.model)), build / PROGRAM)


def write_training_plan(plan: Plan, build: Path, fingerprint: str) -> None:
    """training.yaml"""
    document = training_plan(
        plan.loaded, build, plan.checkpoint, plan.head, plan.captured.layer_path, fingerprint,
        {"teacher": plan.teacher_costs, "student": plan.student_costs},
    )  # fmt: skip
    write_text(build / TRAINING, render(document, plan.loaded.path, build))


def validate(
    plan: Plan,
    student: Student,
    source: WeightSource,
    buffers: Buffers,
    build: Path,
    samples: torch.Tensor | None,
    device: str,
    progress: Progress,
) -> list[verify.Check]:
    """All checks of `verify`, on logits of a few sequences."""
    config = plan.captured.config
    longest = getattr(config, "max_position_embeddings", None) or verify.SAMPLE[1]
    length = plan.captured.length or min(verify.SAMPLE[1], int(longest))
    ids = verify.sample_ids(config.vocab_size, length, samples)
    settings = _settings(plan, device)
    make = student_weights(source, student.recipes, plan.captured.number_format)
    exact = [s for s in plan.targets.statuses if s.student < s.teacher and s.status != "exact"]

    def held(name: str) -> torch.Tensor:
        """The teacher's parameter as the spec says that it is held."""
        return source.get(name).to(plan.captured.number_format(name))

    with progress.task("verify", 6, "checks") as task:
        try:
            model = verify.load_student(build / STUDENT, plan.captured.attention)
            wanted = verify.logits_of(model, ids)
        except WorkError as error:
            # Says of the widths what the configuration alone can say.
            return [
                verify.check_widths(build / STUDENT, _config_widths(plan), {}, {}),
                verify.broken("reload", error),
            ]
        shapes = {name: tuple(value.shape) for name, value in stored_tensors(plan.model).items()}
        got = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
        checks = [verify.check_widths(build / STUDENT, _config_widths(plan), shapes, got)]
        task.advance(1)
        rewritten = _logits(student.graph_module, plan.captured, make, student.buffers, settings, ids)
        checks.append(
            verify.compare("reload", rewritten, wanted, "rewritten graph against student/ loaded by transformers")
        )
        task.advance(1)
        if exact:
            checks.append(verify.skipped("masked", f"{exact[0].axis}: {exact[0].reason}"))
        else:
            reference = masked_reference(plan.captured.graph_module, plan.table, student.narrowing)
            masked = _logits(reference, plan.captured, _masked(student.recipes, held), buffers, settings, ids)
            pruned = rewritten
            if student.repaired and plan.dtype != RUN_DTYPE:
                # The folded constants were rounded once more for student/: compared is what they are before that.
                pruned = _logits(
                    student.graph_module,
                    plan.captured,
                    _unrounded(student.recipes, held),
                    student.buffers,
                    settings,
                    ids,
                )
            detail = "teacher with everything dropped set to zero against the rewritten graph"
            checks.append(verify.compare("masked", masked, pruned, detail))
        task.advance(1)
        whole = _logits(plan.captured.graph_module, plan.captured, held, buffers, settings, ids)
        turned = recipes(
            plan.captured, plan.table.parameters, verify.permuted(student.narrowing), range(plan.captured.layer_count)
        )
        mixed = _logits(
            plan.captured.graph_module,
            plan.captured,
            lambda name: turned[name].make(held(name)),
            buffers,
            settings,
            ids,
        )
        checks.append(
            verify.compare("permutation", mixed, whole, "teacher with its narrowed axes permuted against itself")
        )
        task.advance(1)
        custom = holds_custom(student.graph_module)
        checks.append(
            verify.check_program(build, model, ids, wanted, plan.dtype, streamed=source.streamed, custom=custom)
        )
        task.advance(1)
        checks.append(verify.check_head(model, plan.head, ids, wanted))
        task.advance(1)
    return checks


def check_rotation(
    plan: Plan,
    teacher: WeightSource,
    rotated: RotatedWeights,
    buffers: Buffers,
    samples: torch.Tensor | None,
    device: str,
) -> verify.Check:
    """The teacher in its new basis, whole and with nothing fitted, is the teacher."""
    assert plan.rotation is not None
    captured, settings = plan.captured, _settings(plan, device)
    length = captured.length or verify.SAMPLE[1]
    ids = verify.sample_ids(captured.config.vocab_size, length, samples)
    graph_module, fetch = rotated_reference(captured.graph_module, plan.table, rotated, plan.rotation.tied)
    whole = _logits(captured.graph_module, captured, teacher.get, buffers, settings, ids)
    turned = _logits(graph_module, captured, fetch, buffers, settings, ids)
    detail = "the teacher on its principal components, all of them kept, against itself"
    return verify.compare("rotation", turned, whole, detail, ROTATION_TOLERANCE)


def _unrounded(made: Mapping[str, Recipe], held: Fetch) -> Fetch:
    """The student's parameters in RUN_DTYPE, from what the teacher's are in the checkpoint's number format."""
    return lambda name: made[name].make(held(made[name].source).to(RUN_DTYPE))


def _masked(made: Mapping[str, Recipe], held: Fetch) -> Fetch:
    """The teacher's parameters with everything dropped at zero; a dropped layer's are zero altogether."""
    by_source = {recipe.source: recipe for recipe in made.values()}

    def fetch(name: str) -> torch.Tensor:
        weight = held(name)
        return by_source[name].mask(weight) if name in by_source else torch.zeros_like(weight)

    return fetch


def _logits(
    graph_module: GraphModule, captured: Captured, fetch: Fetch, buffers: Buffers, settings: Settings, ids: torch.Tensor
) -> torch.Tensor:
    found: list[torch.Tensor] = []
    executor = Executor(graph_module, captured.layer_of, fetch, buffers, settings)
    executor.run([ids], output=lambda logits, _: found.append(logits.float().cpu()))
    return found[0]


def _settings(plan: Plan, device: str) -> Settings:
    return Settings(device, RUN_DTYPE, plan.dtype)


def _run_buffers(plan: Plan, config: Any) -> Buffers:
    """The tables of a model that is loaded in RUN_DTYPE: in the checkpoint's own format a scale may be rounded."""
    return load_buffers(build_meta(config, RUN_DTYPE, plan.captured.attention))


def _config_widths(plan: Plan) -> dict[str, int]:
    """Configuration key -> width, for everything that was asked for."""
    from minitron.compiler.roles.widths import teacher_widths

    old = teacher_widths(plan.captured, plan.roles, plan.table)
    keys = {name: config_key(plan.captured.config, name, old[name]) for name in plan.targets.widths}
    attribute_map = getattr(plan.config, "attribute_map", {})
    wanted = {attribute_map.get(key, key): plan.targets.widths[name] for name, key in keys.items() if key is not None}
    layers = attribute_map.get(LAYERS, LAYERS)
    if layers in plan.config.to_dict():  # else the length of a list over layers says it
        wanted[layers] = plan.targets.layers
    return wanted


def _score_key(plan: Plan, data: str, samples: torch.Tensor, config: CalibrationConfig) -> str:
    """A hash of everything that decides the scores."""
    digest = hashlib.sha256()
    files = sorted({info.file for info in plan.checkpoint.tensors.values()})
    for part in (
        (plan.checkpoint.tied_config or plan.checkpoint.config).to_json_string(),
        repr([file_hash(file) for file in files]),
        data,
        repr(config),
        str(plan.dtype),
        torch.__version__,
    ):
        digest.update(part.encode())
    digest.update(samples.numpy().tobytes())
    return digest.hexdigest()


def _check_unchanged(before: Inputs, now: Inputs) -> None:
    """WorkError where what the spec names has changed while it was compiled: the student is of neither."""
    for path, _, _ in changes(before, now):
        raise WorkError(f"{' '.join(path)} changed while the student was compiled; let it rest and compile again")


def _fingerprint(plan: Plan, selection: Selection, inputs: Inputs, source: WeightSource) -> str:
    """Identifies the pruned student: the contents of its teacher, wherever it lies, basis, selection and dtype."""
    from minitron.compiler.importance.select import selection_json

    headers = sorted((name, info.dtype, info.shape) for name, info in plan.checkpoint.tensors.items())
    teacher = inputs["teacher"]
    assert isinstance(teacher, dict)
    contents = {key: value for key, value in teacher.items() if key not in ("model", "revision", "spec")}
    parts = (
        repr(headers),
        json.dumps(contents, sort_keys=True),
        json.dumps(selection_json(selection, plan.roles)),
        plan.config.to_json_string(),
        str(plan.dtype),
        source.digest() if isinstance(source, RotatedWeights) else "",
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _guard_training(build: Path, fingerprint: str) -> None:
    """A build that holds the training of another student is not overwritten."""
    from minitron.compiler.plan.plan import read_plan

    old = read_plan(build)
    trained = any((build / WORK).glob("*")) or (build / MODEL).exists()
    if old is not None and trained and old.get("fingerprint") != fingerprint:
        raise UsageError(
            f"{build} holds the training of another student (other widths, selection or teacher); "
            "name another folder with -o, or remove its train/ and model/"
        )


def _read_scores(path: Path, key: str) -> ScoreTable | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            if (handle.metadata() or {}).get("key") != key:
                return None
            return ScoreTable.from_tensors({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except SafetensorError:
        return None


def _write_scores(path: Path, key: str, scores: ScoreTable) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(scores.to_tensors(), temporary, metadata={"key": key})


def _json(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
