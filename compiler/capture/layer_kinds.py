"""Finds the layers of a model that compute the same function: runs the model once without data and records each layer.

Every operation is seen below the modelling file's own code, with its constants, the sizes of its results, and where
each operand comes from: the layer's own parameter, a value of this layer, the value that the layer before it hands on,
or a value from outside the layers. Two layers with the same account are the same function of their parameters and
inputs, whatever their modules are called; a scale that follows the layer's number, another window or a layer without
rotary embedding shows in the account. Layers that cannot be compared count as different: `accounts` returns None, and
every layer is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_CONSTANT = 4096  # elements of a constant that are compared one by one; a larger one is a table of some kind


@dataclass(frozen=True)
class Accounts:
    """The operations outside the layers, and those of each layer. Equal accounts mean equal functions."""

    outside: tuple[Any, ...]
    layers: tuple[tuple[Any, ...], ...]


class _CannotTellError(Exception):
    """The layers are not a chain in which each hands one value to the next."""


def accounts(
    model: torch.nn.Module, layer_path: str, run: Callable[[torch.Tensor], object], sample: torch.Tensor
) -> Accounts | None:
    """Records the layers of `model`, which holds fake tensors; `run` runs it on `sample`. None where layers cannot be
    compared."""
    layers = list(model.get_submodule(layer_path).children())
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {id(tensor): name for name, tensor in reversed([*names, ("sample", sample)])}
    recorder = _Recorder(known, layer_path + ".", len(layers))
    with _watched(layers, recorder), torch.no_grad(), _compiling_state_context():
        try:
            with recorder:
                run(sample)
            return recorder.accounts()
        except Exception:  # whatever a modelling file raises here decides only whether there is a shorter way
            return None


@contextmanager
def _watched(layers: list[torch.nn.Module], recorder: _Recorder) -> Iterator[None]:
    hooks = []
    for number, layer in enumerate(layers):
        hooks += [
            layer.register_forward_pre_hook(lambda *_, number=number: recorder.enter(number)),
            layer.register_forward_hook(lambda *_: recorder.leave()),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation. `names` are the model's tensors by identity; layers' names start with `prefix`."""

    def __init__(self, names: dict[int, str], prefix: str, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._prefix, self._count = names, prefix, count
        self._outside: list[Any] = []
        self._layers: list[list[Any]] = [[] for _ in range(count)]
        self._entered = 0
        self._inside = False
        # Where a value was made: the layer (None: outside), and how many values were made there before it.
        self._made: dict[int, tuple[int | None, int]] = {}
        self._number = dict.fromkeys([None, *range(count)], 0)
        self._alive: list[Any] = []
        self._handed_on: dict[int, int] = {}

    @property
    def _layer(self) -> int | None:
        return self._entered - 1 if self._inside else None

    def enter(self, number: int) -> None:
        if self._inside or number != self._entered:
            raise _CannotTellError("layers do not follow each other")
        self._entered, self._inside = number + 1, True

    def leave(self) -> None:
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layer = self._layer
        if layer is None and 0 < self._entered < self._count:
            raise _CannotTellError("something is computed between the layers")
        spelled = (str(func), self._spell(args), self._spell(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        (self._outside if layer is None else self._layers[layer]).append((*spelled, self._results(result, layer)))
        return result

    def _results(self, result: Any, layer: int | None) -> Any:
        """Sizes of the results, which get their places. A tensor changed in place keeps the one that it has."""
        if isinstance(result, list | tuple):
            return tuple(self._results(one, layer) for one in result)
        if not isinstance(result, torch.Tensor):
            return repr(result)
        if id(result) not in self._made and id(result) not in self._names:
            self._made[id(result)] = (layer, self._number[layer])
            self._number[layer] += 1
            self._alive.append(result)  # or its identity would be given to another one
        return (str(result.dtype), tuple(result.shape))

    def _spell(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._origin(value)
        if isinstance(value, list | tuple):
            return tuple(self._spell(one) for one in value)
        if isinstance(value, dict):
            return tuple((key, self._spell(one)) for key, one in sorted(value.items()))
        return repr(value)

    def _origin(self, tensor: torch.Tensor) -> Any:
        layer, key = self._layer, id(tensor)
        if key in self._names:
            return self._named(self._names[key], layer)
        if key in self._made:
            maker, number = self._made[key]
            if maker == layer:
                return ("here", number)
            if maker is None:
                return ("outside", number)
            if maker != (self._count - 1 if layer is None else layer - 1):
                raise _CannotTellError("a layer reads what a distant one has made")
            if self._handed_on.setdefault(maker, key) != key:
                raise _CannotTellError("a layer hands on several values")
            return "before"
        if isinstance(tensor, FakeTensor) or tensor.numel() > LARGEST_CONSTANT:
            raise _CannotTellError("a tensor of unknown origin")
        return ("constant", str(tensor.dtype), repr(tensor.tolist()))

    def _named(self, name: str, layer: int | None) -> Any:
        if not name.startswith(self._prefix):
            return ("named", name)
        number, rest = name[len(self._prefix) :].split(".", 1)
        if int(number) != layer:
            raise _CannotTellError("layers share parameters")
        return ("own", rest)

    def accounts(self) -> Accounts:
        if self._inside or self._entered != self._count:
            raise _CannotTellError("not every layer was run")
        return Accounts(tuple(self._outside), tuple(tuple(one) for one in self._layers))
