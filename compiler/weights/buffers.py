"""The buffers that a model's own code computes when it is loaded."""

from __future__ import annotations

import torch

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.capture.rotary import fill_long_frequencies


def load_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Computes the buffers that a model on the meta device makes for itself (rotary frequencies, embedding scales), by
    name.

    Uses the hook by which transformers restores them after loading, so they are what a loaded model has. The hook is
    called on every module, not only on those that hold a buffer: some fill the buffers of the modules below them.
    """
    places = [
        (f"{path}.{name}" if path else name, module, name)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    ]
    empty = {full: module._buffers[name] for full, module, name in places}
    for full, module, name in places:
        module._buffers[name] = torch.full_like(empty[full], 0, device="cpu")
    for value in stored_tensors(model).values():
        value._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad():
        model.initialize_weights()  # type: ignore[operator]
        fill_long_frequencies(model)
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # else a second call does nothing
    filled = {full: module._buffers[name] for full, module, name in places}
    for full, module, name in places:
        module._buffers[name] = empty[full]
    return {full: value for full, value in filled.items() if value is not None}
