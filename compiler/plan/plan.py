"""The plan: everything that is known before a weight is read. `compile` starts from it, `plan` prints it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.axes.analysis import analyse
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import FIXED_LENGTH, Captured, capture
from minitron.compiler.capture.models import build_meta, canonical_names, stored_tensors
from minitron.compiler.estimate import model_costs as costs
from minitron.compiler.estimate.estimate import Reckoning
from minitron.compiler.estimate.fit import fits_json
from minitron.compiler.estimate.hardware import Outlook
from minitron.compiler.estimate.kv_cache import cache_layers
from minitron.compiler.estimate.training_defaults import place_teacher
from minitron.compiler.graph.names import dtype_of
from minitron.compiler.importance.select import Selection, leading, selection_json, wanted_heads
from minitron.compiler.plan.checks import check_documents, check_lengths, check_padding, check_pairs, check_tokenizer
from minitron.compiler.plan.prove import prove, proved
from minitron.compiler.plan.recovery import recovery_remarks, rotation_of
from minitron.compiler.roles.lm_head import find_head
from minitron.compiler.roles.names import HIDDEN, LAYERS
from minitron.compiler.roles.residual_stream import LayerEnds, adds_to_its_entry, layer_ends
from minitron.compiler.roles.roles import Roles, find_roles
from minitron.compiler.roles.rotation import Rotation
from minitron.compiler.roles.widths import teacher_widths
from minitron.compiler.student.status import AxisStatus
from minitron.compiler.student.targets import Targets, resolve_targets
from minitron.compiler.teacher.checkpoint import BrokenWeights, Checkpoint, fetch_weights
from minitron.compiler.teacher.open_teacher import open_teacher
from minitron.compiler.teacher.tokenizer import tokenizer_files
from minitron.compiler.teacher.untie import untie, untied_config
from minitron.compiler.weights.recipes import renumber
from minitron.compiler.weights.source import check_headers
from minitron.specs.available import unavailable
from minitron.specs.builds import PLAN
from minitron.specs.data_files import check_data
from minitron.specs.errors import SpecInvalid, UsageError, WorkError, located
from minitron.specs.load import LoadedSpec
from minitron.specs.progress import Progress
from minitron.specs.training_plan import HeadPlan

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A spec resolved against its teacher.

    captured, table, roles, ends, head   what the graph of the teacher says
    targets                              the widths asked for
    config, model                        the student's configuration, proved on the meta device, and that model
    teacher_costs, student_costs         from shapes alone
    rotation                             what a rotation of the residual stream does to the parameters, where one is possible
    """

    loaded: LoadedSpec
    build: Path
    checkpoint: Checkpoint
    captured: Captured
    table: AxisTable
    roles: Roles
    ends: tuple[LayerEnds, ...]
    head: HeadPlan
    targets: Targets
    config: Any
    model: torch.nn.Module
    teacher_costs: costs.ModelCosts
    student_costs: costs.ModelCosts
    remarks: tuple[str, ...]
    rotation: Rotation | None = None

    @property
    def rotates(self) -> bool:
        """Whether the student is cut from the rotated teacher."""
        principal = self.loaded.spec.importance.hidden_basis == "principal"
        return principal and HIDDEN in self.targets.widths

    @property
    def teacher_head(self) -> HeadPlan:
        """The head of the teacher as it is trained against: tied, where only the student's is untied."""
        return self.head.model_copy(update={"weight": self.checkpoint.aliases.get(self.head.weight, self.head.weight)})

    @property
    def dtype(self) -> torch.dtype:
        """The number format of teacher and student."""
        return self.captured.dtype

    def to_json(self, selection: Selection | None = None, outlook: Outlook = Outlook()) -> dict[str, Any]:
        """The document of `plan --json` and plan.json; it has `fits` where `outlook` names devices."""
        spec = self.loaded.spec
        widths = teacher_widths(self.captured, self.roles, self.table)
        student = {**widths, **self.targets.widths, LAYERS: self.targets.layers}
        document: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "spec": {
                "name": spec.name,
                "path": str(self.loaded.path),
                "sha256": self.loaded.sha256,
                "overrides": list(self.loaded.overrides),
                "pins": dict(self.loaded.pins),
                "resolved": self.loaded.resolved,
            },
            "teacher": self._side(self.teacher_costs, widths)
            | {"model": self.checkpoint.name, "commit": self.checkpoint.commit},
            "student": self._side(self.student_costs, student),
            "axes": [_axis(status) for status in self.targets.statuses],
            "phases": self.phases(outlook),
            "costs": [cost.to_json() for cost in self.reckoning.all_costs(outlook)],
            "devices": self.reckoning.devices(outlook),
            "remarks": list(self.remarks),
        }
        if outlook.named:
            document["fits"] = fits_json(self.reckoning, outlook)
        if selection is not None:
            document["selection"] = selection_json(selection, self.roles)
        return document

    def _side(self, model: costs.ModelCosts, widths: Mapping[str, int]) -> dict[str, Any]:
        return {"model_type": self.captured.config.model_type, **model.to_json(), "widths": dict(widths)}

    @cached_property
    def reckoning(self) -> Reckoning:
        """What it all costs; nothing is reckoned twice."""
        return Reckoning(self)

    def phases(self, outlook: Outlook = Outlook()) -> list[dict[str, Any]]:
        """What is done, in order, and what it costs."""
        return [phase.to_json(outlook) for phase in self.reckoning.phases(outlook)]

    def sharding(self) -> tuple[bool, bool]:
        """Whether student and teacher are sharded where several devices train, as training.yaml has it."""
        assert self.loaded.spec.distill is not None
        layout = self.loaded.spec.distill.layout
        teacher = layout.teacher or place_teacher(self.teacher_costs.weight_bytes)
        return layout.student == "sharded", teacher == "sharded"

    def kept_checkpoints(self) -> int:
        """How many checkpoints of a training stay on the disk."""
        assert self.loaded.spec.distill is not None
        checkpoint = self.loaded.spec.distill.checkpoint
        return checkpoint.keep_last + checkpoint.keep_best

    @property
    def needs_scores(self) -> bool:
        """Whether activations decide anything."""
        chosen = self.targets.named_layers is not None or self.targets.layers == self.captured.layer_count
        return bool(self.targets.widths) or not chosen


def _axis(status: AxisStatus) -> dict[str, Any]:
    return {
        "axis": status.axis,
        "teacher": status.teacher,
        "student": status.student,
        "status": status.status,
        "reason": status.reason,
    }


def make_plan(loaded: LoadedSpec, *, build: Path, weights: bool = False) -> Plan:
    """Resolves a spec. SpecInvalid with everything that is wrong with it, each at its place.

    Without `weights` the configuration and whatever weight headers are there suffice; with it the plan can be compiled: the
    weights are there, or on the Hub, from where `with_weights` fetches them.
    """
    spec = loaded.spec
    errors = located(unavailable(spec), loaded)
    errors += check_data(loaded) + check_documents(loaded)
    at = "teacher.model" if spec.teacher.spec is None else "teacher.spec"
    try:
        checkpoint = open_teacher(loaded, weights=weights, planned=_student_of)
    except BrokenWeights as broken:
        errors.append(loaded.error(at, str(broken)))
        checkpoint = broken.checkpoint
    except SpecInvalid as error:
        raise SpecInvalid([*errors, *error.errors]) from None
    except UsageError as error:
        raise SpecInvalid([*errors, loaded.error(at, str(error))]) from None
    wrong_tokens, remarks = check_tokenizer(loaded, checkpoint)
    errors += wrong_tokens
    if padding := check_padding(loaded, checkpoint):
        raise SpecInvalid([*errors, *padding])
    try:
        captured, checkpoint = _capture(loaded, checkpoint)
        table = analyse(captured)
        roles = find_roles(captured, table)
        head = find_head(captured)
    except SpecInvalid as error:
        raise SpecInvalid([*errors, *error.errors]) from None
    except UsageError as error:
        raise SpecInvalid([*errors, loaded.error(at, str(error))]) from None
    try:
        check_headers(captured, checkpoint)
    except UsageError as error:
        errors.append(loaded.error(at, str(error)))
    targets, wrong = resolve_targets(spec.student, captured, roles, table, loaded.error)
    errors += wrong + check_lengths(loaded, captured)
    if targets is not None:
        errors += check_pairs(loaded, captured.layer_count, targets.layers)
    if targets is None or errors:
        raise SpecInvalid(errors)
    ends: tuple[LayerEnds, ...] = ()
    try:
        ends = tuple(layer_ends(captured))
    except UsageError as error:
        if targets.layers != captured.layer_count:
            raise SpecInvalid([loaded.error("student", f"no layer can be dropped: {error}")]) from None
    targets = _told_of_layers(captured, ends, targets)
    rotation = rotation_of(loaded, captured, table, roles, targets)
    try:
        layers = leading(targets, roles).layers
        targets, config, model = proved(loaded, captured, table, roles, targets, layers)
    except UsageError as error:
        raise SpecInvalid([loaded.error("student", str(error))]) from None
    plain = _as_stored(checkpoint, captured)
    teacher_cost, student_cost = _both_costs(captured, table, roles, targets, layers, head, config, model, plain)
    return Plan(
        loaded, build, checkpoint, captured, table, roles, ends, head, targets, config, model, teacher_cost, student_cost,
        (*_remarks(checkpoint, captured), *remarks, *recovery_remarks(loaded, checkpoint, targets, rotation, model)),
        rotation,
    )  # fmt: skip


def with_weights(plan: Plan, progress: Progress) -> Plan:
    """The plan with its teacher's weights on this machine, fetched at the commit that was planned. SpecInvalid where they
    are not to be had or contradict the configuration, WorkError where they are broken."""
    if plan.checkpoint.commit is None:
        return plan
    if not plan.checkpoint.on_disk:
        progress.message(f"fetching the weights of {plan.checkpoint.name}")
    try:
        checkpoint = fetch_weights(plan.checkpoint)
        if plan.checkpoint.aliases:
            checkpoint = untie(checkpoint, plan.checkpoint.config, plan.checkpoint.aliases)
        check_headers(plan.captured, checkpoint)
    except UsageError as error:
        raise SpecInvalid([plan.loaded.error("teacher.model", str(error))]) from None

    def told(known: Checkpoint) -> tuple[str, ...]:
        of_recovery = recovery_remarks(plan.loaded, known, plan.targets, plan.rotation, plan.model)
        return (*_remarks(known, plan.captured), *of_recovery)

    others = (remark for remark in plan.remarks if remark not in told(plan.checkpoint))
    return replace(plan, checkpoint=checkpoint, remarks=(*told(checkpoint), *others))


def _capture(loaded: LoadedSpec, checkpoint: Checkpoint) -> tuple[Captured, Checkpoint]:
    """The teacher's graph; where the head is to be untied, that of the same teacher with two matrices, and its checkpoint."""
    dtype, length = dtype_of(loaded.spec.teacher.dtype or checkpoint.dtype), _fixed_length(loaded)
    if not loaded.spec.importance.untie:
        return capture(checkpoint.config, dtype, length), checkpoint
    try:
        config = untied_config(checkpoint.config)
    except UsageError as error:
        raise SpecInvalid([loaded.error("importance.untie", str(error), "leave it out")]) from None
    captured = capture(config, dtype, length)
    tied = canonical_names(build_meta(checkpoint.config, dtype, captured.attention))
    aliases = {name: first for name, first in tied.items() if first != name == captured.canonical.get(name)}
    if not aliases:
        message = f"transformers ties the head of a {config.model_type} whatever its configuration says"
        raise SpecInvalid([loaded.error("importance.untie", message, "leave it out")])
    return captured, untie(checkpoint, config, aliases)


def _as_stored(checkpoint: Checkpoint, captured: Captured) -> torch.nn.Module:
    """The teacher's model as its folder has it, on the meta device."""
    if checkpoint.tied_config is None:
        return captured.model
    return build_meta(checkpoint.tied_config, captured.dtype, captured.attention)


def _told_of_layers(captured: Captured, ends: Sequence[LayerEnds], targets: Targets) -> Targets:
    """The targets, where a layer does more to the residual stream than to add to it: passing by is no masking then."""
    nodes = {node.name: node for node in captured.graph.nodes}
    scaled = next((i for i, end in enumerate(ends) if not adds_to_its_entry(nodes, end)), None)
    if scaled is None:
        return targets
    reason = f"a dropped layer is passed by, and layer {scaled} does more to the residual stream than to add to it"
    statuses = tuple(
        replace(one, status="approximate", reason=reason) if one.axis == LAYERS else one for one in targets.statuses
    )
    return replace(targets, statuses=statuses)


def _student_of(upper: LoadedSpec, build: Path) -> Any:
    """The configuration of the student that the spec above plans."""
    return make_plan(upper, build=build).config


def _fixed_length(loaded: LoadedSpec) -> int:
    """Tokens that a graph is captured for which cannot be of any number: no more than a calibration sample has."""
    data = loaded.spec.importance.data
    return FIXED_LENGTH if data is None else min(FIXED_LENGTH, data.sequence_length)


def settled(plan: Plan, selection: Selection) -> Plan:
    """The plan once it is known which layers stay: lists over layers follow them. SpecInvalid where they cannot."""
    layers = selection.layers
    if layers == leading(plan.targets, plan.roles).layers:
        return plan
    try:
        config, model = prove(plan.captured, plan.table, plan.roles, plan.targets, layers)
    except UsageError as error:
        raise SpecInvalid([plan.loaded.error("student", str(error))]) from None
    _, student_costs = _both_costs(
        plan.captured, plan.table, plan.roles, plan.targets, layers, plan.head, config, model,
        _as_stored(plan.checkpoint, plan.captured),
    )  # fmt: skip
    return replace(plan, config=config, model=model, student_costs=student_costs)


def _both_costs(
    captured: Captured,
    table: AxisTable,
    roles: Roles,
    targets: Targets,
    layers: Sequence[int],
    head: HeadPlan,
    config: Any,
    model: torch.nn.Module,
    plain: torch.nn.Module,
) -> tuple[costs.ModelCosts, costs.ModelCosts]:
    """Of the teacher as it is stored, `plain`, and of the student."""
    stacked = costs.stacked_parameters(captured, table, roles)
    chosen = costs.chosen_experts(roles)
    attention = costs.attention_counts(captured, roles, table)
    embedding = costs.embedding_name(captured)
    size = torch.empty(0, dtype=captured.dtype).element_size()
    read = (
        head.weight if head.weight in stored_tensors(plain) else embedding
    )  # a head that is untied in the student only
    teacher = costs.model_costs(
        plain, stacked, chosen, list(attention.values()), embedding, read, size,
        cache_layers(captured.config, captured.attention),
    )  # fmt: skip
    narrowed = []
    for layer in (layer for layer in layers if layer in attention):
        counts = attention[layer]
        groups, repeats = wanted_heads(targets, roles.heads[layer])
        narrowed.append(costs.HeadCounts(groups, groups * repeats, counts.key_width, counts.value_width))
    numbers = {old: new for new, old in enumerate(layers)}
    left = {renumber(captured, name, numbers) for name in stacked if captured.layer_in_path(name) in numbers}
    student = costs.model_costs(
        model, left, chosen, narrowed, embedding, head.weight, size, cache_layers(config, captured.attention)
    )
    return teacher, student


def _remarks(checkpoint: Checkpoint, captured: Captured) -> tuple[str, ...]:
    """What the user should know and no axis says."""
    remarks = [checkpoint.remark] if checkpoint.remark else []
    if checkpoint.folder.is_dir() and not any(tokenizer_files(checkpoint.folder)):
        remarks.append("no tokenizer files are there: they could not be compared with the vocabulary")
    own = dtype_of(checkpoint.dtype)
    if checkpoint.tensors and captured.dtype != own:
        old, new = (str(one).removeprefix("torch.") for one in (own, captured.dtype))
        remarks.append(f"the teacher's weights are {old} and are held as {new}, as the student's are (teacher.dtype)")
    if captured.length is not None:
        remarks.append(
            f"the code of {captured.config.model_type} depends on the number of tokens: its graph is of {captured.length}, "
            f"calibration samples are read in pieces of {captured.length}, and student.pt2 runs on {captured.length} only"
        )
    if checkpoint.tensors:
        known = set(captured.canonical)
        extra = [name for name in checkpoint.tensors if name not in known]
        if extra and all(name in checkpoint.tensors for name in set(captured.canonical.values())):
            remarks.append(
                f"{len(extra)} tensors of the checkpoint are not the model's and are ignored, such as {extra[0]}"
            )
    return tuple(remarks)


def read_plan(build: Path) -> dict[str, Any] | None:
    """The plan.json of a build folder, None where there is none."""
    path = build / PLAN
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{path} is not valid JSON ({error}); remove it and compile again") from None
    return document
