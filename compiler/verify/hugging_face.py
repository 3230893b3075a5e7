"""Models as transformers loads them from a folder, run in their own dtype or, layer by layer, in float32.

Loaded in the dtype of its files a model costs no memory: its weights are the files, read when a layer runs. So a layer's
weights are in float32 only while that layer runs, as they are where a graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import quiet
from minitron.compiler.teacher.model_config import OF_CODE, load_config
from minitron.specs.errors import WorkError, first_line


class NotRunnable(WorkError):
    """Raised where transformers cannot load a model or cannot run it: no check looks at its logits then."""


def load_model(
    folder: Path, attention: str | None, dtype: torch.dtype = torch.float32, *, without_calling: bool = False
) -> Any:
    """The model of a folder, as any user loads it; `attention` None: the implementation that transformers chooses.
    `without_calling` leaves out keys of its configuration that only change how it is called: a tuple in place of an
    output, say.

    NotRunnable with transformers' words.
    """
    from transformers import AutoModelForCausalLM

    chosen: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        if without_calling:
            chosen["config"] = load_config(folder, without=OF_CODE)
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **chosen
            )
    except Exception as error:  # transformers raises anything
        raise NotRunnable(f"{folder} cannot be loaded back by transformers: {first_line(error)}") from None
    problems = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if problems:
        raise NotRunnable(
            f"{folder} does not load back whole: {problems[0]} and {len(problems) - 1} more tensors are off"
        )
    return model.eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]. NotRunnable where the model, though it loads, does not run."""
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what operators raise of shapes that do not fit
        raise NotRunnable(f"it loads, but does not run in transformers: {first_line(error)}") from None


@contextmanager
def in_float32(model: Any, captured: Captured, buffers: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Runs a model in float32 although its files, or the weights that the compile goes by, are in another dtype.

    `buffers` are those of a model loaded in float32.
    """
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point()}
    if dtypes == {torch.float32} and captured.dtype == torch.float32:
        yield
        return
    known = set(captured.canonical)
    stored = {
        value: captured.stored_dtype(name) if name in known else value.dtype for name, value in model.named_parameters()
    }
    layers = list(model.get_submodule(captured.layer_path))
    inside = {id(value) for layer in layers for value in layer.parameters()}
    outside = [one for one in model.parameters() if id(one) not in inside]
    held: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(parameters: list[torch.nn.Parameter]) -> None:
        for one in parameters:
            if one.is_floating_point() and one not in held:
                held[one] = one.data
                one.data = one.data.to(stored[one]).float()

    def narrow(parameters: list[torch.nn.Parameter]) -> None:
        for one in parameters:
            if one in held:
                one.data = held.pop(one)

    def before(layer: torch.nn.Module, *_: Any) -> None:
        widen(list(layer.parameters()))

    def after(layer: torch.nn.Module, *_: Any) -> None:
        narrow(list(layer.parameters()))

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after, always_call=True) for layer in layers]
    own = _replace_buffers(model, buffers)
    widen(outside)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        narrow([*held])
        _replace_buffers(model, own)


def _replace_buffers(model: torch.nn.Module, buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sets buffers by name; returns those that were there. A buffer that checkpoints hold becomes float32."""
    before: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for name, value in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if value is None:
                continue
            before[full] = value
            kept = name not in module._non_persistent_buffers_set and value.is_floating_point()
            module._buffers[name] = buffers.get(full, value.float() if kept else value)
    return before
