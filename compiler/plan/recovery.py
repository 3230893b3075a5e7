"""Checks what a spec asks of the basis and of recovery against its teacher, and writes the plan's remarks on both."""

from __future__ import annotations

from collections.abc import Iterator

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.importance.sample_rows import SampleRows
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.expert_weights import find_expert_weights
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, NUM_EXPERTS
from minitron.compiler.roles.rotation import Rotation, find_rotation
from minitron.compiler.student.targets import Targets
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.consistency import proposes_shapes
from minitron.specs.errors import Problem, Refused, UsageError
from minitron.specs.load import LoadedSpec


def rotation_of(loaded: LoadedSpec, teacher: AnalysedTeacher, targets: Targets) -> Rotation | None:
    """Returns the effect of rotating the residual stream on the parameters; None where no rotation is possible.

    Refuses a spec that asks for a rotation that is not possible.
    """
    captured = teacher.captured
    try:
        return find_rotation(captured, teacher.table, teacher.roles)
    except UsageError as error:
        if loaded.spec.importance.hidden_basis == "channels" or HIDDEN not in targets.widths:
            return None
        message = f"the residual stream of this {captured.config.model_type} cannot be rotated: {error}"
        raise Refused([Problem("importance.hidden_basis", message, "write channels, or leave it out")]) from None


def check_merging(loaded: LoadedSpec, teacher: AnalysedTeacher) -> Iterator[Problem]:
    """Checks that every head has keys and values of its own, where dropped heads are to be folded into kept ones."""
    if not loaded.spec.recovery.merge_heads:
        return
    kind, shared = teacher.captured.config.model_type, [one for one in teacher.roles.heads.values() if one.repeats > 1]
    if shared:
        message = (
            f"{shared[0].repeats} query heads of this {kind} share the keys and values of a group: a dropped head has none of "
            "its own that could be folded into a kept head's"
        )
    elif not teacher.roles.heads:
        message = f"this {kind} has no attention whose heads could be found"
    else:
        return
    yield Problem("recovery.merge_heads", message, "write false or leave it out")


def check_merged_experts(loaded: LoadedSpec, teacher: AnalysedTeacher) -> Iterator[Problem]:
    """Checks that every expert has weights of its own whose neurons can be reordered, where dropped ones are to be merged."""
    if not loaded.spec.recovery.merge_experts:
        return
    kind, roles = teacher.captured.config.model_type, teacher.roles
    layers = roles.widths.get(NUM_EXPERTS, {})
    if not layers:
        message = f"this {kind} has no experts"
    else:
        try:
            for layer in layers:
                find_expert_weights(teacher.table, roles, layer)
            return
        except UsageError as error:
            message = f"the experts of this {kind} cannot be merged: {error}"
    yield Problem("recovery.merge_experts", message, "write false or leave it out")


def check_eliminated_experts(loaded: LoadedSpec, teacher: AnalysedTeacher) -> Iterator[Problem]:
    """Checks that it is known which experts meet at a token, where experts are to be eliminated."""
    spec, roles = loaded.spec, teacher.roles
    if spec.importance.selection != "greedy" or (spec.student.num_experts is None and not proposes_shapes(spec)):
        return
    rows = SampleRows(teacher.captured, teacher.table)
    for layer in roles.widths.get(NUM_EXPERTS, {}):
        mixture = roles.mixtures[layer]
        if mixture.told_apart and mixture.ends is not None and rows.find_tokens(mixture.contribution) is None:
            message = (
                f"the graph of this {teacher.captured.config.model_type} does not show which tokens the experts of layer "
                f"{layer} are sent, so it is not known what they add together"
            )
            yield Problem("importance.selection", message, "write scores, or leave num_experts out")
            return


def recovery_remarks(
    loaded: LoadedSpec, checkpoint: Checkpoint, targets: Targets, rotation: Rotation | None, student: object
) -> Iterator[str]:
    """Yields remarks on the basis and the head's matrix of the student, with the price of an untied head."""
    importance = loaded.spec.importance
    sizes = {name: value.numel() for name, value in stored_tensors(student).items()}  # type: ignore[arg-type]
    whole = sum(sizes.values())
    if checkpoint.aliases:
        extra = sum(sizes[name] for name in checkpoint.aliases)
        yield (
            f"importance.untie: the student's head has a matrix of its own, {extra:,} parameters "
            f"({extra / (whole - extra):.1%}) more than a tied one"
        )
    if loaded.spec.recovery.merge_heads and not {HEADS, GROUPS} & targets.widths.keys():
        yield "merge_heads changes nothing here: num_attention_heads is not narrowed"
    if loaded.spec.recovery.merge_experts and NUM_EXPERTS not in targets.widths:
        yield "merge_experts changes nothing here: num_experts is not narrowed"
    if importance.hidden_basis == "channels":
        return
    if HIDDEN not in targets.widths:
        yield "hidden_basis: principal changes nothing here: hidden_size is not narrowed"
    elif rotation is not None and rotation.tied is not None:
        extra = sizes.get(rotation.tied.parameter, 0)
        yield (
            "hidden_basis: principal: one matrix is fitted to the embedding and the head, which are tied; "
            f"importance.untie: true gives the head its own, {extra:,} parameters ({extra / whole:.1%}) more"
        )
