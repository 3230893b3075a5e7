"""The student's configuration: the teacher's with the narrowed keys, and the proof that it describes the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minitron.compiler.capture import Captured, build_meta
from minitron.specs.errors import UsageError

# Keys that a width is known by in the configurations of models that do not use the standard one.
OTHER_KEYS = {
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_intermediate_size"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "shared_expert_intermediate_size": ("shared_intermediate_size",),
}


def config_key(config: Any, name: str, value: int) -> str | None:
    """The configuration's own key for a width, if it has one that says `value`."""
    for key in (name, *OTHER_KEYS.get(name, ())):
        if getattr(config, key, None) == value:
            return key
    return None


def student_config(
    captured: Captured, widths: Mapping[str, int], teacher_widths: Mapping[str, int], kept_layers: Sequence[int]
) -> Any:
    """The configuration with new `widths` (by axis name) and per-layer lists that follow the kept layers."""
    config = copy.deepcopy(captured.config)
    if "head_dim" in teacher_widths and has_head_dim(config):
        config.head_dim = teacher_widths["head_dim"]
    for name, width in widths.items():
        key = config_key(captured.config, name, teacher_widths[name])
        if key is None:
            raise UsageError(f"{config.model_type} has no configuration key for {name}")
        setattr(config, key, width)
    count = captured.layer_count
    if len(kept_layers) != count:
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == count and not key.startswith("_"):
                setattr(config, key, [value[i] for i in kept_layers])
        config.num_hidden_layers = len(kept_layers)
    return config


def has_head_dim(config: Any) -> bool:
    """Whether the configuration can say the width of a head, and does not only derive it."""
    return hasattr(config, "head_dim") and not isinstance(getattr(type(config), "head_dim", None), property)


def prove(captured: Captured, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    """Builds the student on the meta device and compares every shape. Returns it; UsageError where one differs."""
    try:
        model = build_meta(config, captured.dtype, captured.attention)
    except Exception as error:  # a modelling file raises anything for widths that it cannot have
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"transformers cannot build {config.model_type} with these widths: {reason}") from None
    got = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [name for name in shapes if got.get(name) != shapes[name]] + [name for name in got if name not in shapes]
    if wrong:
        name = wrong[0]
        raise UsageError(
            f"the configuration of {config.model_type} cannot express these widths: {name} would be "
            f"{_shape(got.get(name))} when it is loaded, and has to be {_shape(shapes.get(name))} "
            f"({len(wrong)} tensors differ)" + _why(captured)
        )
    return model


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _why(captured: Captured) -> str:
    config = captured.config
    if not has_head_dim(config):
        return (
            "; this model's head width is always hidden_size / num_attention_heads, "
            f"{config.hidden_size} / {config.num_attention_heads}: narrow both in that proportion"
        )
    return ""
