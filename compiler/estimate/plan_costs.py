"""The costs of teacher and student of a plan, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minitron.compiler.capture.models import build_meta, stored_tensors
from minitron.compiler.estimate import model_costs as costs
from minitron.compiler.estimate.kv_cache import cache_layers
from minitron.compiler.importance.select import wanted_heads
from minitron.compiler.plan.plan import Plan
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.student.targets import Targets


def plan_costs(plan: Plan) -> tuple[costs.ModelCosts, costs.ModelCosts]:
    """Returns the costs of the teacher and those of the student."""
    captured, table, roles, head = plan.teacher.captured, plan.teacher.table, plan.teacher.roles, plan.teacher.head
    stacked = costs.stacked_parameters(captured, table, roles)
    chosen = costs.chosen_experts(roles)
    attention = costs.attention_counts(captured, roles, table)
    embedding = costs.embedding_name(captured)
    size = captured.dtype.itemsize
    stored = _as_stored(plan)
    # A head that is untied in the student only is the embedding in the teacher.
    read = head.weight if head.weight in stored_tensors(stored) else embedding
    teacher = costs.model_costs(
        stored,
        costs.Parts(embedding, read, stacked, chosen),
        list(attention.values()),
        cache_layers(captured.config, captured.attention),
        size,
    )
    return teacher, student_costs(plan.teacher, plan.targets, plan.layers, plan.config, plan.model)


def student_costs(
    teacher: AnalysedTeacher, targets: Targets, layers: Sequence[int], config: Any, model: torch.nn.Module
) -> costs.ModelCosts:
    """Returns the costs of a student: `config` and `model` describe what is left by `targets` of the kept `layers`."""
    captured, table, roles = teacher.captured, teacher.table, teacher.roles
    attention = costs.attention_counts(captured, roles, table)
    narrowed = []
    for layer in (layer for layer in layers if layer in attention):
        counts = attention[layer]
        groups, repeats = wanted_heads(targets, roles.heads[layer])
        narrowed.append(costs.HeadCounts(groups, groups * repeats, counts.key_width, counts.value_width))
    numbers = {old: new for new, old in enumerate(layers)}
    stacked = costs.stacked_parameters(captured, table, roles)
    left = {captured.renumbered(name, numbers) for name in stacked if captured.layer_in_path(name) in numbers}
    return costs.model_costs(
        model,
        costs.Parts(costs.embedding_name(captured), teacher.head.weight, left, costs.chosen_experts(roles)),
        narrowed,
        cache_layers(config, captured.attention),
        captured.dtype.itemsize,
    )


def _as_stored(plan: Plan) -> torch.nn.Module:
    """The teacher's model as its folder has it, on the meta device."""
    captured, config = plan.teacher.captured, plan.checkpoint.tied_config
    return captured.model if config is None else build_meta(config, captured.dtype, captured.attention)
