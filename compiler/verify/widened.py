"""Runs a model of transformers in float32, on the device of the compile, with one parameter in float32 at a time.

The model was loaded in the dtype of its files, so that its weights are the files, read when they are used. While it runs, every
parameter is a stand-in of the right shape, dtype and device without bytes. An operation that reads one gets the parameter
itself, made from the file for this operation, and nothing of it stays. A lookup reads the rows that it looks up.

Code that does not go through torch's operations cannot read a stand-in: where a model does not run with them, it runs with all
its parameters in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.memory import apart_from_heap
from minitron.compiler.graph.names import Fetch

T = TypeVar("T")

# Questions that a stand-in answers itself.
_OF_THE_OUTSIDE = {"__get__", "size", "dim", "numel", "nelement", "is_floating_point", "element_size", "__len__"}
# What reads a tensor's bytes by itself, past torch's operations.
_OF_THE_BYTES = {torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.__dlpack__}


class StandIn(torch.Tensor):
    """A parameter that `made` of a part of its `file` becomes when an operation reads it."""

    file: torch.Tensor
    made: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def of(file: torch.Tensor, stored: torch.dtype, device: str) -> StandIn:
        """The stand-in of a parameter that the spec loads in the dtype `stored`."""
        place = torch.device(device)
        empty: StandIn = torch.Tensor._make_wrapper_subclass(StandIn, file.shape, dtype=torch.float32, device=place)
        empty.file, empty.made = file, lambda part: part.to(stored).to(device).float()
        return empty

    def whole(self) -> torch.Tensor:
        """The parameter."""
        with apart_from_heap():
            return self.made(self.file)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ in _OF_THE_OUTSIDE:
                return func(*args, **kwargs)
            if func in _OF_THE_BYTES:
                raise NotImplementedError("a stand-in has no bytes")
            if func is torch.Tensor.__getitem__ and isinstance(args[0], StandIn):
                return args[0].made(args[0].file[_on_the_host(args[1])])
            if func is torch.nn.functional.embedding and len(args) > 1 and isinstance(args[1], StandIn):
                weight = args[1]
                return weight.made(func(_on_the_host(args[0]), weight.file, *args[2:], **kwargs))
            args, kwargs = tree_map_only(StandIn, StandIn.whole, (args, kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(StandIn, StandIn.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def _on_the_host(index: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda one: one.cpu(), index)


def run_in_float32(
    model: Any,
    captured: Captured,
    buffers: Mapping[str, torch.Tensor],
    device: str,
    work: Callable[[Fetch], T],
) -> T:
    """Does `work` while a model runs in float32 although its files, or the weights that the spec goes by, are in another dtype.

    `buffers` are those of a model loaded in float32. `work` is given a function from any name of a parameter to the parameter.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    dtypes = {value.dtype for value in names.values() if value.is_floating_point()}
    if dtypes == {torch.float32} and captured.dtype == torch.float32 and torch.device(device).type == "cpu":
        return work(lambda name: names[name].detach())
    known = set(captured.canonical)
    stored = {
        value: captured.stored_dtype(name) if name in known else value.dtype for name, value in model.named_parameters()
    }
    stand_ins = {
        one: StandIn.of(one.detach(), dtype, device) for one, dtype in stored.items() if one.is_floating_point()
    }
    try:
        with _replaced(model, stand_ins, buffers, device):
            return work(lambda name: _parameter(model, name))
    except Exception:  # anything that code makes of a tensor without bytes
        whole = {one: stand_in.whole().cpu() for one, stand_in in stand_ins.items()}
        with _replaced(model, whole, buffers, "cpu"):
            return work(lambda name: _parameter(model, name))


def _parameter(model: Any, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    found: torch.Tensor = model.get_submodule(path)._parameters[key]
    return found.whole() if isinstance(found, StandIn) else found


@contextmanager
def _replaced(
    model: Any, parameters: Mapping[torch.Tensor, torch.Tensor], buffers: Mapping[str, torch.Tensor], device: str
) -> Iterator[None]:
    """Puts others in the places of parameters and, by name, of buffers. A buffer that checkpoints hold becomes float32."""
    places: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is not None:
                places.append((module._parameters, name, value))
                module._parameters[name] = parameters.get(value, value)
        for name, value in module._buffers.items():
            if value is not None:
                places.append((module._buffers, name, value))
                kept = name not in module._non_persistent_buffers_set and value.is_floating_point()
                full = f"{path}.{name}" if path else name
                module._buffers[name] = buffers.get(full, value.float() if kept else value).to(device)
    try:
        yield
    finally:
        for table, name, value in places:
            table[name] = value
