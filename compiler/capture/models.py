"""Hugging Face models on the meta device: building them, and what a checkpoint of one holds."""

from __future__ import annotations

import contextlib
import copy
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from minitron.compiler.capture.rotary import hold_long_frequencies
from minitron.specs.errors import UsageError


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the notices of export and model construction: they name nothing that a user could act on.

    Errors that fake tensors log are raised as well, and the caller decides what they mean.
    """
    names = ("transformers", "torch.export", "torch._export", "torch.fx", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL if logger.name == names[-1] else logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()


def modelling_line(error: Exception) -> str:
    """Returns ` (FILE:LINE)` of the line of modelling code that an error came from; empty where it came from elsewhere."""
    code = [one for one in traceback.extract_tb(error.__traceback__) if "modeling_" in one.filename]
    return f" ({Path(code[-1].filename).name}:{code[-1].lineno})" if code else ""


def build_meta(config: Any, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """The model of a configuration on the meta device: shapes and names, no bytes."""
    with quiet(), torch.device("meta"):
        return build_model(config, dtype, attention)


def build_model(config: Any, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """The model of a configuration on whatever device is the default, in eval mode."""
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    hold_long_frequencies(model)
    return model.eval()


def without_grouped_products(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its experts multiplied row by row: grouped products run on the meta device in bfloat16 only, and only with
    rows of a multiple of 16 bytes."""
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        with contextlib.suppress(ValueError, NotImplementedError):  # experts of a kind that has no other product
            model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return model


@contextmanager
def uninitialised() -> Iterator[None]:
    """Leaves out the random initialisation of models that are built of fake tensors: nothing reads their values, and some
    families' initialisation cannot run without data. Ties between parameters are made as ever."""
    from transformers import PreTrainedModel

    name = "initialize_weights"
    original = getattr(PreTrainedModel, name)
    setattr(PreTrainedModel, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(PreTrainedModel, name, original)


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name, which tied parameters share.

    A buffer that checkpoints hold, such as a router's correction, is a parameter here: it is learnt, not computed.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in _stored(model)}


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of a model holds, by canonical name."""
    names = canonical_names(model)
    return {name: value for name, value in _stored(model) if names[name] == name}


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


# Keys that say how many layers there are, where the model is one half of a pair that has a number for each.
LAYER_COUNTS = ("decoder_layers", "num_decoder_layers")


def layer_keys(config: Any) -> tuple[str, ...]:
    """The keys that say the number of layers; of a decoder that is half of a pair, the decoder's alone."""
    return tuple(key for key in LAYER_COUNTS if isinstance(getattr(config, key, None), int)) or ("num_hidden_layers",)


def layer_count(config: Any) -> int:
    """The number of layers that a configuration says."""
    return int(getattr(config, layer_keys(config)[0]))


def find_layers(model: torch.nn.Module, config: Any) -> tuple[str, int]:
    """The outermost module list that is as long as the configuration says that the model has layers."""
    count = layer_count(config)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return path, count
    raise UsageError(
        f"{config.model_type}: no list of {count} layers in the model; minitron narrows models whose layers stand in one list"
    )
