"""The teacher as its graph shows it: what every later stage reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from minitron.compiler.axes.analysis import analyse
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.roles.lm_head import check_backbone, find_head
from minitron.compiler.roles.residual_stream import LayerEnds, layer_ends
from minitron.compiler.roles.roles import Roles, find_roles
from minitron.compiler.roles.widths import teacher_widths
from minitron.specs.errors import UsageError
from minitron.specs.training_plan import HeadPlan


@dataclass(frozen=True)
class AnalysedTeacher:
    """The five things that an analysis yields.

    captured  the graph, and the model and configuration that it was exported from
    table     the dimensions of every parameter and value
    roles     the named axes
    ends      the nodes that carry the residual stream into and out of each layer; empty where `no_ends` says why
    head      the way from the last hidden state to the logits
    """

    captured: Captured
    table: AxisTable
    roles: Roles
    ends: tuple[LayerEnds, ...]
    head: HeadPlan
    no_ends: str = ""

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Every axis by name; an axis that differs from layer to layer has its largest width here."""
        return teacher_widths(self.captured, self.roles, self.table)


def analyse_teacher(captured: Captured) -> AnalysedTeacher:
    """Runs every analysis over a captured teacher. Raises UsageError where the residual stream or the head is not
    found."""
    table = analyse(captured)
    roles = find_roles(captured, table)
    head = find_head(captured)
    check_backbone(captured, head.backbone)
    try:
        return AnalysedTeacher(captured, table, roles, tuple(layer_ends(captured)), head)
    except UsageError as error:  # refused only where layers are dropped
        return AnalysedTeacher(captured, table, roles, (), head, str(error))
