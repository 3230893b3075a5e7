"""Measures the memory that a model needs beside its weights while it computes, by running the model without data.

A model of a few layers, some of each kind, is run on fake tensors (sizes without bytes) at the batch and length in
question, forward and, for training, backward. Whatever is allocated is counted while it lives. So what a modelling
file saves for its backward, in which dtype and with or without recomputation, is measured and not guessed; the
layers that were left out count as much as those of their kind that were run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from minitron.compiler.capture.layer_config import with_layers
from minitron.compiler.capture.layer_lists import kinds_by_lists, some_of_each_kind
from minitron.compiler.capture.models import build_model, quiet
from minitron.specs.attention_modules import attention_of
from minitron.specs.blocks.distill import Recomputation

EACH = 2  # layers of each kind that are run: one more than one, so that what two layers hold together is seen


@dataclass(frozen=True)
class Footprint:
    """Bytes. `kept` is what the forward leaves for the backward (nothing without training), `transient` the most that
    lives beside it at one time."""

    kept: int
    transient: int

    def times(self, factor: int) -> Footprint:
        """Returns the footprint of a batch that is `factor` times as large."""
        return Footprint(self.kept * factor, self.transient * factor)


@dataclass(frozen=True)
class Work:
    """The settings of a run: `weights` is the dtype of the weights, `autocast` makes products in bf16 whatever that
    dtype is, `training` adds a backward, `recompute` says what the backward computes again."""

    sequences: int
    length: int
    weights: torch.dtype
    autocast: bool = False
    training: bool = False
    recompute: Recomputation = False


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, while they live. `known` ones do not count."""

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result if isinstance(result, list | tuple) else (result,))
        return result

    def count(self, values: Iterable[Any]) -> None:
        """Counts tensors among `values`, each while it lives, if it is not counted yet."""
        for one in values:
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known or key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def footprint(config: Any, attention: str, backbone: str, layer_path: str, count: int, work: Work) -> Footprint:
    """Measures the model of `config`, whose `count` layers stand in the module list `layer_path`, up to its last hidden
    state.

    `backbone` is the sub-module that yields the hidden states.
    """
    kinds = kinds_by_lists(config, count)
    few = some_of_each_kind(kinds, range(count), EACH)
    with quiet(), no_packing(), FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(with_layers(config, count, few), work.weights, attention)
        model.train(work.training)
        if work.recompute:
            _recompute(model, layer_path, work.recompute)
        entered, last, left, peak = _run(model, backbone, layer_path, work)
    # What a layer keeps is seen when the next one is entered: until then its caller still holds what it was given.
    kept: dict[str, list[int]] = {}
    for place, layer in enumerate(few[:-1]):
        kept.setdefault(kinds[layer], []).append(entered[place + 1] - entered[place])
    kept.setdefault(kinds[few[-1]], [last - entered[-1]])
    of_kind = {kind: sum(found) // len(found) for kind, found in kept.items()}
    seen = sum(of_kind[kinds[layer]] for layer in few)
    whole = sum(of_kind[kind] for kind in kinds)
    if not work.training:
        return Footprint(0, peak)
    return Footprint(whole + left - seen, max(0, peak - left))


@contextmanager
def no_packing() -> Iterator[None]:
    """Disables the detection of packed documents for models that are run without data. Their positions cannot be read,
    so transformers would provide for several documents in one sequence with a mask that it leaves out where it can read
    that there is one."""
    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda *_, **__: None)
    try:
        yield
    finally:
        if original is None:
            delattr(masking_utils, name)
        else:
            setattr(masking_utils, name, original)


def _recompute(model: Any, layer_path: str, what: Recomputation) -> None:
    """Turns recomputation on as the runtime does; the first name is that of transformers 5.23 and later."""
    if what is True:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        return
    for layer in model.get_submodule(layer_path):
        for module in attention_of(layer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _run(model: Any, backbone: str, layer_path: str, work: Work) -> tuple[list[int], int, int, int]:
    """Returns the bytes alive when each layer is entered, when the last is left and at the end of the forward; and the
    peak."""
    living = Living([*model.parameters(), *model.buffers()])
    entered: list[int] = []
    left: list[int] = []
    model.requires_grad_(work.training)
    ids = torch.zeros(work.sequences, work.length, dtype=torch.long)
    with ExitStack() as stack:
        for layer in model.get_submodule(layer_path):
            stack.callback(layer.register_forward_pre_hook(lambda *_: entered.append(living.now)).remove)
            stack.callback(layer.register_forward_hook(lambda *_: left.append(living.now)).remove)
        for parameter in model.parameters() if work.training else ():
            stack.callback(parameter.register_post_accumulate_grad_hook(_forget).remove)
        stack.enter_context(torch.enable_grad() if work.training else torch.no_grad())
        with living:
            with torch.autocast("cpu", torch.bfloat16) if work.autocast else nullcontext():
                hidden = model.get_submodule(backbone)(input_ids=ids, use_cache=False).last_hidden_state
            layers = len(model.get_submodule(layer_path))
            entered, last, end = entered[:layers], left[layers - 1], living.now  # recomputation enters them again
            if work.training:
                hidden.backward(torch.ones_like(hidden))
            del hidden
    return entered, last, end, living.peak


def _forget(parameter: torch.nn.Parameter) -> None:
    """Drops a gradient: gradients are counted with the weights."""
    parameter.grad = None
