"""Tiny models of every family, captured and analysed once in a session."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig

from minitron.compiler.capture.capture import capture
from minitron.compiler.roles.analysed import AnalysedTeacher, analyse_teacher
from tests.models import COMMON, FAMILIES

# Families that no teacher of the other tests is of, and what makes each itself.
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 64},
    "olmo2": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"], "head_dim": 8},
}  # fmt: skip
EVERY = (*FAMILIES, *MORE)


def config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of two layers; None leaves a key out."""
    keys = COMMON | {"num_hidden_layers": 2} | (FAMILIES | MORE)[family] | changes
    known = AutoConfig.for_model(family)
    result = AutoConfig.for_model(
        family, **{key: value for key, value in keys.items() if value is not None and hasattr(known, key)}
    )
    if family == "lfm2":  # its configuration does not declare the key that its modelling file reads
        result.head_dim = keys["head_dim"]
    return result


@functools.cache
def analysed(family: str, **changes: Any) -> AnalysedTeacher:
    """`changes` replace keys of the configuration. Two layers are as good as four here."""
    return analyse_teacher(capture(config(family, **changes)))


def describe(teacher: AnalysedTeacher, parameter: str) -> list[str]:
    """The dimensions of a parameter in words."""
    return [teacher.table.space.describe(dim) for dim in teacher.table.parameters[parameter]]
