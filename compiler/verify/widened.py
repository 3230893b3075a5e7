"""Runs a model of transformers in float32, on the device of the compile, with one parameter in float32 at a time.

The model was loaded in the dtype of its files, so that its weights are the files, read when they are used. While it runs, every
parameter is a stand-in of the right shape, dtype and device without bytes. An operation that reads one gets the parameter
itself, made from the file for this operation, and nothing of it stays. A lookup reads the rows that it looks up.

Code that reads memory past torch's operations cannot read a stand-in. A model with such code runs with all its parameters in
float32 on the CPU, which takes the memory that stand-ins save: it is said, with the module and the bytes. Whatever else a
model raises is its own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.memory import apart_from_heap
from minitron.compiler.graph.names import Fetch
from minitron.compiler.verify.hugging_face import NotRunnable
from minitron.specs.errors import first_line

T = TypeVar("T")

Say = Callable[[str], None]
"""Called with a sentence for the user."""

# Questions that a stand-in answers itself.
_OF_THE_OUTSIDE = {"__get__", "size", "dim", "numel", "nelement", "is_floating_point", "element_size", "__len__"}
# What reads a tensor's bytes by itself, past torch's operations.
_OF_THE_BYTES = {torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.__dlpack__}
# Words of the errors of code that wants the bytes of a stand-in, which torch raises where StandIn does not.
_WORDS = ("a stand-in has no bytes", "data pointer", "storage", "StandIn")


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


class InFloat32:
    """A `model` that runs in float32 although its files, or the weights that the spec goes by, are in another dtype.

    `buffers` are those of a model loaded in float32. `say` is told, once, where stand-ins are not enough; `note` says the
    same behind a semicolon, for what a check tells, and is empty where they are.
    """

    def __init__(
        self, model: Any, captured: Captured, buffers: Mapping[str, torch.Tensor], device: str, say: Say
    ) -> None:
        self.model, self.note = model, ""
        self._captured, self._buffers, self._device, self._say = captured, buffers, device, say

    def run(self, work: Callable[[Fetch], T]) -> T:
        """Does `work`, which is given a function from any name of a parameter to the parameter."""
        model, captured = self.model, self._captured
        names = dict(model.named_parameters(remove_duplicate=False))
        dtypes = {value.dtype for value in names.values() if value.is_floating_point()}
        if dtypes == {torch.float32} == {captured.dtype} and torch.device(self._device).type == "cpu":
            return work(lambda name: names[name].detach())
        known = set(captured.canonical)
        stand_ins = {
            value: StandIn.of(
                value.detach(), captured.stored_dtype(name) if name in known else value.dtype, self._device
            )
            for name, value in model.named_parameters()
            if value.is_floating_point()
        }
        if not self.note:
            try:
                with _replaced(model, stand_ins, self._buffers, self._device):
                    return work(lambda name: _parameter(model, name))
            except (RuntimeError, TypeError, NotRunnable) as error:
                reason = _reading_bytes(error)
                if reason is None:
                    raise
                self._tell(reason, _module_of(error, model), sum(4 * one.numel() for one in stand_ins))
        whole = {one: stand_in.whole().cpu() for one, stand_in in stand_ins.items()}
        with _replaced(model, whole, self._buffers, "cpu"):
            return work(lambda name: _parameter(model, name))

    def _tell(self, reason: str, place: str, size: int) -> None:
        cost = f"all parameters in float32 in memory at once, {size:,} bytes"
        self.note = f"; with {cost}, because {place} reads them past torch's operations"
        self._say(
            f"verify: {place} reads parameters past torch's operations ({reason}), so the model of transformers runs on "
            f"the CPU with {cost}"
        )


def _reading_bytes(error: BaseException | None) -> str | None:
    """The words of the error that code raised because a stand-in has no bytes; None where this is another error."""
    while error is not None:
        if isinstance(error, RuntimeError | TypeError) and any(word in str(error) for word in _WORDS):
            return first_line(error)
        error = error.__context__  # what was raised from None has one too
    return None


def _module_of(error: BaseException | None, model: Any) -> str:
    """The module inside of which an error was raised first, by class and name."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    while error is not None:
        frame: TracebackType | None = error.__traceback__
        while frame is not None:
            module = frame.tb_frame.f_locals.get("self")
            if names.get(id(module)):
                found = f"{type(module).__name__} ({names[id(module)]})"
            frame = frame.tb_next
        error = error.__context__
    return found


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
