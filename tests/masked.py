"""The teacher with everything dropped masked, on transformers' own modules: a reference that knows nothing of the compiler.

It reads the teacher's folder and the `selection` of plan.json, and nothing else. What is gone is taken away where it flows:

    channels of the residual stream   at 0 in what the embedding, attention and feed-forward modules yield
    norms                             over the channels, or heads, that are kept: the module itself, with its weight cut
    neurons, query heads              at 0 in what the output projections read
    neurons of one expert             at 0 in that expert's rows of the stacked output projection
    experts                           at -infinity in the router's logits, and in its correction where it has one
    layers                            hand on what they are given

The logits of such a teacher are those of the student, whatever kind of norm the family has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Lists = Mapping[str, Sequence[Sequence[int]]]
ROUTERS = ("gate", "router")
# Feed-forward neurons, by what they are called in a selection.
DENSE, OF_EXPERTS, SHARED = "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"


@dataclass
class Masked:
    """A teacher to be masked. `model` is changed in place; `attention` and `neurons` are the output projections' names."""

    model: Any
    selection: Lists
    attention: str = "o_proj"
    neurons: str = "down_proj"
    layers_at: str = "model.layers"
    reached: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers: list[Any] = list(self.model.get_submodule(self.layers_at))
        (self.kept,) = self.selection["num_hidden_layers"]
        self.hidden = self.selection.get("hidden_size", [None])[0]
        self.width = int(self.model.config.hidden_size)
        if self.hidden is not None:
            self._mask_output(self.model.get_input_embeddings(), self.width, self.hidden)
            for name, module in self.model.named_modules():
                if is_norm(module) and module.weight.shape == (self.width,) and not self._of_heads(name):
                    narrow_norm(module, self.hidden)
        for number, layer in enumerate(self.layers):
            if number not in self.kept:
                layer.register_forward_hook(
                    lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
                )
        self._heads()
        self._feed_forward()
        for layer in (self.layers[number] for number in self.kept):
            if self.hidden is not None:
                for projection in self._projections(layer, self.attention) + self._projections(layer, self.neurons):
                    self._mask_output(projection, self.width, self.hidden)

    @staticmethod
    def _of_heads(name: str) -> bool:
        return name.rsplit(".", 1)[-1] in ("q_norm", "k_norm")

    @staticmethod
    def _projections(layer: Any, name: str) -> list[Any]:
        return [
            module
            for path, module in layer.named_modules()
            if path.split(".")[-1] == name and isinstance(module, torch.nn.Linear)
        ]

    @staticmethod
    def _mask_output(module: Any, width: int, kept: Sequence[int]) -> None:
        mask = flags(width, kept)
        module.register_forward_hook(lambda module, args, output: output * mask)

    @staticmethod
    def _mask_input(module: Any, kept: Sequence[int]) -> None:
        mask = flags(module.in_features, kept)
        module.register_forward_pre_hook(lambda module, args: (args[0] * mask, *args[1:]))

    def _heads(self) -> None:
        if "num_attention_heads" not in self.selection:
            return
        count = int(self.model.config.num_attention_heads)
        lists = zip(
            self.kept, self.selection["num_attention_heads"], self.selection["num_key_value_heads"], strict=True
        )
        for number, heads, groups in lists:
            (projection,) = self._projections(self.layers[number], self.attention)
            width = projection.in_features // count
            channels = spread(heads, width)
            self._mask_input(projection, channels)
            for path, module in self.layers[number].named_modules():
                if self._of_heads(path) and is_norm(module) and module.weight.numel() > width:
                    whole = count if path.endswith("q_norm") else int(self.model.config.num_key_value_heads)
                    each = module.weight.numel() // whole
                    narrow_norm(module, spread(heads if path.endswith("q_norm") else groups, each))

    def _feed_forward(self) -> None:
        lists = {
            name: iter(rows)
            for name, rows in self.selection.items()
            if name in (DENSE, OF_EXPERTS, SHARED, "num_experts")
        }
        for number in self.kept:
            layer = self.layers[number]
            stacks = [m for _, m in layer.named_modules() if getattr(getattr(m, self.neurons, None), "ndim", 0) == 3]
            for projection in self._projections(layer, self.neurons):
                name = SHARED if stacks else DENSE
                if name in lists:
                    self._mask_input(projection, next(lists[name]))
            for experts in stacks:
                self._experts(number, layer, experts, lists)

    def _experts(self, number: int, layer: Any, experts: Any, lists: Mapping[str, Any]) -> None:
        weight = getattr(experts, self.neurons)  # [experts, hidden, neurons], or its transpose
        count = weight.shape[0]
        kept = list(next(lists["num_experts"])) if "num_experts" in lists else list(range(count))
        name = OF_EXPERTS if OF_EXPERTS in lists else DENSE
        if name in lists:
            for expert in kept:
                axis = -2 if getattr(experts, "is_transposed", weight.shape[-1] == self.width) else -1
                mask = flags(weight.shape[axis], next(lists[name]))
                with torch.no_grad():
                    weight[expert] *= mask[:, None] if axis == -2 else mask
        if self.hidden is not None:
            experts.register_forward_hook(lambda module, args, output: output * flags(self.width, self.hidden or ()))
        routers = [m for path, m in layer.named_modules() if path.split(".")[-1] in ROUTERS and hasattr(m, "weight")]
        for router in routers[:1]:
            self._router(router, kept, count)
        self.reached[number] = set()
        experts.register_forward_pre_hook(self._count(number), with_kwargs=True)

    def _count(self, number: int) -> Callable[..., None]:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and not value.is_floating_point():
                    self.reached[number] |= set(value.flatten().tolist())

        return count

    @staticmethod
    def _router(router: Any, kept: Sequence[int], count: int) -> None:
        gone = flags(count, kept) == 0
        for name, value in router.named_buffers():
            if "correction" in name:
                value[gone] = -torch.inf
        forward = router.forward

        def masked(*args: Any, **kwargs: Any) -> Any:
            with _MinusInfinity(router.weight, gone):
                return forward(*args, **kwargs)

        router.forward = masked

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model, ids)


class _MinusInfinity(TorchFunctionMode):
    """Sets what a router's weight yields for experts that are gone to -infinity."""

    def __init__(self, weight: torch.Tensor, gone: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.gone = weight, gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        of_weight = any(one is self.weight or getattr(one, "data_ptr", int)() == self.weight.data_ptr() for one in args)
        if func is torch.nn.functional.linear and of_weight:
            result = result.masked_fill(self.gone, -torch.inf)
        return result


def is_norm(module: Any) -> bool:
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def narrow_norm(module: Any, kept: Sequence[int]) -> None:
    """Makes a norm one over the kept channels alone; the others are at 0 in what it yields."""
    small, index = copy.deepcopy(module), torch.tensor(list(kept))
    for name, value in module.named_parameters():
        setattr(small, name, torch.nn.Parameter(value[index].detach()))
    if isinstance(small, torch.nn.LayerNorm):
        small.normalized_shape = (len(kept),)

    def forward(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        part = small(x[..., index], *rest, **more)
        return torch.zeros(*x.shape, dtype=part.dtype).index_copy(-1, index, part)

    module.forward = forward


def flags(width: int, kept: Sequence[int]) -> torch.Tensor:
    """1.0 at the kept indices of `width`, 0.0 elsewhere."""
    mask = torch.zeros(width)
    mask[list(kept)] = 1.0
    return mask


def spread(indices: Sequence[int], width: int) -> list[int]:
    """The channels of heads."""
    return [head * width + channel for head in indices for channel in range(width)]


def folder_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]"""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return result
