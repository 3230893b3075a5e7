"""The JSON of a plan: what `plan --json` prints and plan.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from minitron.compiler.estimate.all_costs import all_costs
from minitron.compiler.estimate.deployment import deployment
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.fit import fits_json
from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.importance.select import Selection, selection_json
from minitron.compiler.plan.plan import Plan
from minitron.compiler.roles.names import LAYERS

FORMAT_VERSION = 1


def plan_document(
    plan: Plan, selection: Selection | None = None, hardware: HardwareAssumptions = HardwareAssumptions()
) -> dict[str, Any]:
    """The document of a plan, with `selection` once it is made, and with `fits` where `hardware` names devices."""
    spec, estimate = plan.loaded.spec, Estimate(plan)
    widths, student = plan.teacher.widths, student_widths(plan)
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "spec": {
            "name": spec.name,
            "path": str(plan.loaded.path),
            "sha256": plan.loaded.sha256,
            "overrides": list(plan.loaded.overrides),
            "pins": dict(plan.loaded.pins),
            "resolved": plan.loaded.resolved,
            "fitted": dict(plan.loaded.fitted),
        },
        "teacher": _side(plan, estimate.teacher_costs, widths)
        | {"model": plan.checkpoint.name, "commit": plan.checkpoint.commit},
        "student": _side(plan, estimate.student_costs, student),
        "axes": [asdict(status) for status in plan.targets.statuses],
        "phases": [phase.to_json(hardware) for phase in estimate.phases(hardware)],
        "costs": [cost.to_json() for cost in all_costs(estimate, hardware)],
        "devices": estimate.devices(hardware),
        "deployment": deployment(plan.config, plan.model, student),
        "data": [use.to_json() for use in plan.data],
        "remarks": list(plan.remarks),
    }
    if plan.search is not None:
        document["search"] = dict(plan.search)
    if hardware.named:
        document["fits"] = fits_json(estimate, hardware)
    if selection is not None:
        document["selection"] = selection_json(selection, plan.teacher.roles)
    return document


def student_widths(plan: Plan) -> dict[str, int]:
    """Returns every width of the student, in the words of the spec."""
    return {**plan.teacher.widths, **plan.targets.widths, LAYERS: plan.targets.layers}


def _side(plan: Plan, model: ModelCosts, widths: Mapping[str, int]) -> dict[str, Any]:
    return {"model_type": plan.teacher.captured.config.model_type, **model.to_json(), "widths": dict(widths)}
