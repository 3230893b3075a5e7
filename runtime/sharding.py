"""Models whose weights are spread over the ranks: fully sharded data parallelism (FSDP2, `fully_shard`; Zhao et al.,
arXiv 2304.11277).

Each decoder layer is one unit: its weights are gathered before it computes, freed after it, gathered again for its
backward, and its gradients are summed and scattered. What lies outside the layers (embedding, last norm, head) is one
more unit, the root. A loss that reads the head's weight directly must run while the root is gathered, so the root is a
module of ours whose forward is whatever function it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minitron.runtime.models import LanguageModel
from minitron.runtime.world import World

T = TypeVar("T")


class Root(nn.Module):
    """What FSDP takes for the whole model. Calling it with a function calls that while embedding, last norm and head
    are whole; what the function returns must hold its differentiable results (in tuples, mappings, dataclasses)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def decoder_layers(model: LanguageModel) -> list[nn.Module]:
    """The layers that the plan names; else, of the backbone's lists of modules, the one with the most parameters."""
    if model.layers is not None:
        return list(model.layers)
    backbone: nn.Module = model.module.get_submodule(model.plan.backbone)
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def compile_layers(model: LanguageModel) -> None:
    """Has each layer's forward compiled when it is first called, in place. Only the forward: the hooks that gather
    weights and the recomputation stay outside, and the names of the weights are what they were."""
    for layer in decoder_layers(model):
        setattr(layer, "forward", torch.compile(layer.forward))  # noqa: B010 (a type checker forbids the plain way)


def shard_student(
    model: LanguageModel,
    world: World,
    compute_dtype: torch.dtype,
    *,
    cpu_offload: bool,
    weights: torch.dtype = torch.float32,
) -> LanguageModel:
    """A student to train, in place: master weights in fp32, or what `weights` says, each rank its rows; gathered in
    `compute_dtype`, gradients summed (not averaged: the loss is a share of the global mean) in fp32.

    `model` is on the CPU in any dtype; weights get their dtype one unit at a time, so that no rank ever holds them all.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if cpu_offload else OffloadPolicy()
    return _shard(model, world, weights, mp_policy=policy, offload_policy=offload)


def shard_teacher(model: LanguageModel, world: World) -> LanguageModel:
    """A teacher that only computes, in place, its weights as they are. Once gathered its root stays whole: it is
    needed for every micro batch, and the layers are what takes the room."""
    return _shard(model, world, None)


def _shard(model: LanguageModel, world: World, dtype: torch.dtype | None, **policies: Any) -> LanguageModel:
    mesh, module = world.mesh(), model.module
    # Scalars cannot be split by rows; they stay whole everywhere, and their gradients are summed with those of
    # whatever else is whole.
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        scalar.data = scalar.data.to(world.device, dtype)
    root = Root(module)
    for unit in [*decoder_layers(model), root]:
        if dtype is not None:
            _to_dtype(unit, dtype)
        fully_shard(unit, mesh=mesh, ignored_params=scalars, **policies)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # A plain sum: dividing by 1 through the communication library is not implemented by all of them.
        unit.set_force_sum_reduction_for_comms(True)
        # Ranks need not use the same parameters: a rank's tokens may all go past an expert.
        unit.set_reduce_scatter_unused_params(True)
    return replace(model, root=root)


def _to_dtype(unit: nn.Module, dtype: torch.dtype) -> None:
    """The parameters of a unit that are still whole, in `dtype`. Not its buffers: these have a dtype of their own."""
    for parameter in unit.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor; a tensor that is not spread, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_like(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of `shape`, whose rows lie where those of the parameter do; there are as many."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    rows = parameter.to_local()
    zeros = torch.zeros(rows.shape[0], *shape[1:], dtype=dtype, device=rows.device)
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
