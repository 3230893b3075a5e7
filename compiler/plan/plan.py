"""The plan: everything that is known before a weight is read. `compile` starts from it, `plan` prints it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture import capture
from minitron.compiler.capture.capture import FIXED_LENGTH, Captured
from minitron.compiler.capture.models import build_meta, canonical_names
from minitron.compiler.graph.names import dtype_of
from minitron.compiler.importance.scores import WidthConfig
from minitron.compiler.importance.select import Selection, leading
from minitron.compiler.importance.taps import CalibrationConfig, DepthConfig
from minitron.compiler.plan.checks import (
    check_documents,
    check_lengths,
    check_padding,
    check_pairs,
    check_tokenizer,
    check_towers,
    teacher_key,
)
from minitron.compiler.plan.data_use import DataUse, data_use, repeated, unread
from minitron.compiler.plan.layer_proofs import LayerProofs, first_provable
from minitron.compiler.plan.recovery import (
    check_eliminated_experts,
    check_merged_experts,
    check_merging,
    recovery_remarks,
    rotation_of,
)
from minitron.compiler.plan.remarks import data_remarks, float8_remarks, folder_remarks, remarks_on
from minitron.compiler.roles.analysed import AnalysedTeacher, analyse_teacher
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS, NUM_EXPERTS
from minitron.compiler.roles.residual_stream import first_rescaling_layer
from minitron.compiler.roles.rotation import Rotation
from minitron.compiler.student.targets import Targets, resolve_targets
from minitron.compiler.teacher.checkpoint import BrokenWeights, Checkpoint, fetch_weights
from minitron.compiler.teacher.open_teacher import open_teacher
from minitron.compiler.teacher.untie import untie, untied_config
from minitron.compiler.towers.language_tower import language_tower
from minitron.compiler.towers.tower_on_disk import tower_on_disk
from minitron.compiler.weights.source import check_headers
from minitron.specs.builds import TOWER
from minitron.specs.consistency import scores_need_data
from minitron.specs.data_files import check_data
from minitron.specs.errors import Problem, Refused, SpecInvalid, UsageError, located, placing
from minitron.specs.fit_lengths import fit_lengths
from minitron.specs.idle_keys import idle_keys
from minitron.specs.load import LoadedSpec
from minitron.specs.model_config import positions_of
from minitron.specs.progress import Progress
from minitron.specs.training_plan import HeadPlan


@dataclass(frozen=True)
class Plan:
    """A spec resolved against its teacher: pure data. Its document and its estimate are made from it.

    teacher        the analysed teacher
    targets        the widths asked for
    layers         the teacher's layers that stay, or where scores will choose the first that could
    config, model  the student's configuration, proved on the meta device, and the model that it describes
    remarks        facts for the user that no axis reports
    rotation       what a rotation of the residual stream does to the parameters, where one is possible
    of_tokenizer   the remarks that its tokenizer asks for
    search         the search that this student is a candidate of, as the plan's document has it
    data           what the training reads, and how often
    missing        what a compile needs and a plan does without: data that is not there
    proofs         the students that keep other layers, as scores may choose them
    """

    loaded: LoadedSpec
    build: Path
    checkpoint: Checkpoint
    teacher: AnalysedTeacher
    targets: Targets
    layers: tuple[int, ...]
    config: Any
    model: torch.nn.Module
    remarks: tuple[str, ...]
    proofs: LayerProofs
    rotation: Rotation | None = None
    of_tokenizer: tuple[str, ...] = ()
    search: Mapping[str, Any] | None = None
    data: tuple[DataUse, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of teacher and student."""
        return self.teacher.captured.dtype

    @property
    def rotates(self) -> bool:
        """Checks whether the student is cut from the rotated teacher."""
        principal = self.loaded.spec.importance.hidden_basis == "principal"
        return principal and HIDDEN in self.targets.widths

    @property
    def covers(self) -> bool:
        """Checks whether a calibration takes the covariance of the residual stream: twice the square of hidden_size operations
        for each token and norm, a sixth of a forward pass. Other scores do not depend on it."""
        return self.rotation is not None and self.loaded.spec.importance.hidden_basis == "principal"

    @property
    def calibration(self) -> CalibrationConfig:
        """The settings that decide the scores; the covariance is taken only where the plan `covers`."""
        importance, rotation = self.loaded.spec.importance, self.rotation
        return CalibrationConfig(
            WidthConfig(importance.width.batch, importance.width.sequence),
            DepthConfig(importance.depth.metric, self.layers_one_by_one),
            () if rotation is None else rotation.sites,
            None if rotation is None else rotation.head_site,
            importance.selection == "greedy",
            self.loaded.spec.recovery.merge_experts,
        )

    @property
    def taken(self) -> CalibrationConfig:
        """The same without a covariance that nobody asks for: what a calibration takes."""
        return self.calibration if self.covers else replace(self.calibration, sites=(), head_site=None)

    @property
    def refits(self) -> bool:
        """Checks whether projections of the student are refitted."""
        return self.loaded.spec.recovery.refit == "least_squares" and bool(self.targets.widths)

    @property
    def merges(self) -> bool:
        """Checks whether dropped heads are folded into kept ones."""
        return self.loaded.spec.recovery.merge_heads and bool({HEADS, GROUPS} & self.targets.widths.keys())

    @property
    def merges_experts(self) -> bool:
        """Checks whether dropped experts are merged into kept ones."""
        return self.loaded.spec.recovery.merge_experts and NUM_EXPERTS in self.targets.widths

    @property
    def heads(self) -> dict[str, HeadPlan]:
        """The heads of `teacher` and `student`; that of the teacher is tied where only the student's is untied."""
        head, aliases = self.teacher.head, self.checkpoint.aliases
        return {"teacher": head.model_copy(update={"weight": aliases.get(head.weight, head.weight)}), "student": head}

    @property
    def rank_layers(self) -> bool:
        """Checks whether scores decide which layers stay."""
        return self.targets.rank_layers(self.teacher.captured.layer_count)

    @property
    def layers_one_by_one(self) -> int:
        """The number of layers that are dropped one after the other; 0 where all are ranked at once."""
        greedy = self.rank_layers and self.loaded.spec.importance.depth.greedy
        return self.teacher.captured.layer_count - self.targets.layers if greedy else 0

    @property
    def needs_scores(self) -> bool:
        """Checks whether the plan needs activations of the teacher."""
        return bool(self.targets.widths) or self.rank_layers


@dataclass(frozen=True)
class Opened:
    """The teacher of a spec, read and analysed: all students of it are planned from here. `problems` are what is wrong with
    the spec whatever the student is; `of_tokenizer` the remarks that the tokenizer asks for; `missing` the data that is not
    there and only a compile needs."""

    checkpoint: Checkpoint
    teacher: AnalysedTeacher
    problems: tuple[Problem, ...]
    of_tokenizer: tuple[str, ...]
    missing: tuple[str, ...] = ()


def make_plan(loaded: LoadedSpec, *, build: Path, weights: bool = False) -> Plan:
    """Resolves a spec with one student. Raises SpecInvalid with every error of the spec, each at its place.

    Without `weights` the configuration and whatever weight headers are there suffice; with it the plan can be compiled:
    the weights are there, or on the Hub, from where `with_weights` fetches them. So is the data, whose absence is but a
    remark of a plan.
    """
    return plan_student(loaded, build, open_spec(loaded, weights=weights))


def open_spec(loaded: LoadedSpec, *, weights: bool) -> Opened:
    """Opens and analyses a spec's teacher; `weights` is as for `make_plan`. Raises SpecInvalid where there is no graph of it,
    with everything else that is wrong."""
    at = teacher_key(loaded)
    problems, missing = check_documents(loaded), [*check_data(loaded), *scores_need_data(loaded.spec)]
    if weights:
        problems, missing = [*problems, *missing], []
    with _adding_to(problems, loaded, at):
        try:
            checkpoint = open_teacher(loaded, weights=weights, planned=_student_of)
        except BrokenWeights as broken:
            problems.append(Problem(at, str(broken)))
            checkpoint = broken.checkpoint
    loaded = fit_lengths(loaded, positions_of(checkpoint.config))
    wrong_tokens, remarks = check_tokenizer(loaded, checkpoint)
    problems += wrong_tokens
    if padding := check_padding(loaded, checkpoint):
        raise SpecInvalid(located([*problems, *padding], loaded))
    with _adding_to(problems, loaded, at):
        checkpoint = language_tower(checkpoint)
        captured, checkpoint = _capture(loaded, checkpoint)
        teacher = analyse_teacher(captured)
    try:
        check_headers(teacher.captured, checkpoint)
    except UsageError as error:
        problems.append(Problem(at, str(error)))
    problems += [*check_lengths(loaded, teacher.captured), *check_merging(loaded, teacher)]
    problems += [*check_merged_experts(loaded, teacher), *check_eliminated_experts(loaded, teacher)]
    lacking = tuple(f"a compile needs data: {problem}" for problem in missing)
    return Opened(checkpoint, teacher, tuple(problems), tuple(remarks), lacking)


def plan_student(loaded: LoadedSpec, build: Path, opened: Opened) -> Plan:
    """Plans the student of a spec whose teacher is open. Raises SpecInvalid with every error of the spec."""
    teacher, checkpoint = opened.teacher, opened.checkpoint
    loaded = fit_lengths(loaded, positions_of(checkpoint.config))
    targets, wrong = resolve_targets(loaded.spec.student, teacher)
    problems = [*opened.problems, *wrong]
    if targets is not None:
        problems += check_pairs(loaded, teacher.captured.layer_count, targets.layers)
        if targets.layers != teacher.captured.layer_count and teacher.no_ends:
            problems.append(Problem("student", f"no layer can be dropped: {teacher.no_ends}"))
    if targets is None or problems:
        raise SpecInvalid(located(problems, loaded))
    targets = mark_depth_approximate(teacher, targets)
    contiguous = loaded.spec.importance.depth.contiguous
    with placing(loaded, "student"):
        rotation = rotation_of(loaded, teacher, targets)
        leads = leading(targets, teacher.roles).layers
        layers, targets, config, model = first_provable(teacher, targets, leads, contiguous=contiguous)
        check_towers(loaded, checkpoint, config)
    plan = Plan(
        loaded, build, checkpoint, teacher, targets, layers, config, model, (),
        LayerProofs(teacher, targets, {layers: (config, model)}), rotation, opened.of_tokenizer,
        data=data_use(loaded, checkpoint), missing=opened.missing,
    )  # fmt: skip
    return replace(plan, remarks=_remarks(plan))


def _remarks(plan: Plan) -> tuple[str, ...]:
    of_recovery = recovery_remarks(plan.loaded, plan.checkpoint, plan.targets, plan.rotation, plan.model)
    of_data = (
        *data_remarks(plan.loaded),
        *repeated(plan.data),
        *unread(plan.data, plan.loaded.spec.distill),
        *plan.missing,
    )
    of_spec = (*float8_remarks(plan.loaded.spec), *map(str, idle_keys(plan.loaded)), *folder_remarks(plan.loaded))
    of_layers = plan.proofs.limits(contiguous=plan.loaded.spec.importance.depth.contiguous)
    of_teacher = remarks_on(plan.checkpoint, plan.teacher.captured)
    return (*of_teacher, *plan.of_tokenizer, *of_layers, *of_recovery, *of_data, *of_spec)


def _capture(loaded: LoadedSpec, checkpoint: Checkpoint) -> tuple[Captured, Checkpoint]:
    """The teacher's graph; where the head is to be untied, that of the same teacher with two matrices, and its checkpoint."""
    dtype, length = dtype_of(loaded.spec.teacher.dtype or checkpoint.dtype), _fixed_length(loaded)
    if not loaded.spec.importance.untie:
        return capture.capture(checkpoint.config, dtype, length), checkpoint
    try:
        config = untied_config(checkpoint.config)
    except UsageError as error:
        raise Refused([Problem("importance.untie", str(error), "leave it out")]) from None
    captured = capture.capture(config, dtype, length)
    tied = canonical_names(build_meta(checkpoint.config, dtype, captured.attention))
    aliases = {name: first for name, first in tied.items() if first != name == captured.canonical.get(name)}
    if not aliases:
        message = f"transformers ties the head of a {config.model_type} whatever its configuration says"
        raise Refused([Problem("importance.untie", message, "leave it out")])
    return captured, untie(checkpoint, config, aliases)


@contextmanager
def _adding_to(problems: list[Problem], loaded: LoadedSpec, at: str) -> Iterator[None]:
    """Raises what stops the plan together with the `problems` found so far; an error without a place stands at `at`."""
    try:
        yield
    except SpecInvalid as error:
        raise SpecInvalid([*located(problems, loaded), *error.errors]) from None
    except Refused as error:
        raise SpecInvalid(located([*problems, *error.problems], loaded)) from None
    except UsageError as error:
        raise SpecInvalid(located([*problems, Problem(at, str(error))], loaded)) from None


def with_weights(plan: Plan, progress: Progress) -> Plan:
    """The plan with its teacher's weights on this machine, fetched at the commit that was planned. Raises SpecInvalid
    where the weights cannot be fetched or contradict the configuration, WorkError where they are broken."""
    if plan.checkpoint.commit is None and plan.checkpoint.tower is None:
        return plan
    if not plan.checkpoint.on_disk:
        progress.message(f"fetching the weights of {plan.checkpoint.name}")
    with placing(plan.loaded, "teacher.model"):
        checkpoint = plan.checkpoint
        if checkpoint.commit is not None:
            checkpoint = language_tower(fetch_weights(checkpoint))
        if checkpoint.tower is not None:
            checkpoint = tower_on_disk(checkpoint, plan.build / TOWER, progress)
        if plan.checkpoint.aliases:
            checkpoint = untie(checkpoint, plan.checkpoint.config, plan.checkpoint.aliases)
        check_headers(plan.teacher.captured, checkpoint)
    plan = replace(plan, checkpoint=checkpoint)
    return replace(plan, remarks=_remarks(plan))


def mark_depth_approximate(teacher: AnalysedTeacher, targets: Targets) -> Targets:
    """The targets, with depth marked approximate where a layer does more to the residual stream than to add to it:
    skipping a layer that rescales the stream differs from zeroing it."""
    scaled = first_rescaling_layer(teacher.captured.graph, teacher.ends)
    if scaled is None:
        return targets
    reason = f"layer {scaled} rescales the residual stream, so skipping a layer differs from zeroing its update"
    statuses = tuple(
        replace(one, status="approximate", reason=reason) if one.axis == LAYERS else one for one in targets.statuses
    )
    return replace(targets, statuses=statuses)


def _student_of(upper: LoadedSpec, build: Path) -> Any:
    """The configuration of the student that the spec above plans."""
    if upper.spec.search is not None:
        raise UsageError(f"the student of {upper.path.name} is found by a search; run that spec first")
    return make_plan(upper, build=build).config


def _fixed_length(loaded: LoadedSpec) -> int:
    """The sequence length of a graph that cannot be exported with a dynamic one: at most that of a calibration sample."""
    data = loaded.spec.importance.data
    return FIXED_LENGTH if data is None else min(FIXED_LENGTH, data.sequence_length)


def settled(plan: Plan, selection: Selection) -> Plan:
    """Returns the plan for the chosen layers, with lists over layers cut to them. Raises SpecInvalid where they cannot
    be."""
    if selection.layers == plan.layers:
        return plan
    with placing(plan.loaded, "student"):
        config, model = plan.proofs.proof(selection.layers)
    return replace(plan, layers=selection.layers, config=config, model=model)
