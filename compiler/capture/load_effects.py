"""Finds the stored tensors that a model's own code writes to on every load, whatever the files hold.

transformers calls a model's initialisation after the files are read; it is to leave alone what was read, and marks these
tensors. Code that writes past the mark, to a view of a tensor, changes them: a padding row that is always zero, say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers import initialization as init

from minitron.compiler.capture.models import quiet, stored_tensors

_READ = "_is_hf_initialized"  # transformers' mark of a tensor that was read from a file


def written_on_load(model: torch.nn.Module) -> set[str]:
    """The canonical names of the stored tensors of a model on the meta device that loading it writes to."""
    stored = stored_tensors(model)
    before = {name: getattr(value, _READ, None) for name, value in stored.items()}
    recorder = _Recorder({value.untyped_storage()._cdata: name for name, value in stored.items()})
    try:
        for value in stored.values():
            setattr(value, _READ, True)
        with quiet(), torch.no_grad(), init.guard_torch_init_functions(), recorder:
            for module, owner in _modules(model, model):
                # On the meta device some initialisation cannot run: the check of the teacher compares what it makes.
                with contextlib.suppress(Exception):
                    owner._init_weights(module)
    finally:
        for name, value in stored.items():
            if before[name] is None:
                delattr(value, _READ)
            else:
                setattr(value, _READ, before[name])
    return recorder.written


def _modules(module: torch.nn.Module, owner: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """Every module, with the model within which transformers initialises it."""
    for child in module.children():
        yield from _modules(child, child if isinstance(child, PreTrainedModel) else owner)
    yield module, owner


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down which of the tensors with known storages are written to."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self.written: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, torch.Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                name = self._names.get(value.untyped_storage()._cdata)
                if name is not None:
                    self.written.add(name)
        return func(*args, **(kwargs or {}))
