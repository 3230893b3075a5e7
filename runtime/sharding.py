"""Models whose weights are sharded over the ranks: fully sharded data parallelism (FSDP2, `fully_shard`; Zhao et al.,
arXiv 2304.11277).

Each decoder layer is one unit: its weights are gathered before it computes, freed after it, gathered again for its
backward pass, and its gradients are summed and scattered. The modules outside the layers (embedding, last norm, head)
are one more unit, the root. A loss that reads the head's weight directly must run while the root is gathered, so the
root is a module of ours whose forward method calls whatever function it is given.
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
    """The module that FSDP treats as the whole model. Calling the root with a function calls that function while
    embedding, last norm and head are whole; the function's return value must hold its differentiable results (in
    tuples, mappings, dataclasses).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def decoder_layers(model: LanguageModel) -> list[nn.Module]:
    """Returns the layers that the plan names; else, of the backbone's module lists, the one with the most
    parameters.
    """
    if model.layers is not None:
        return list(model.layers)
    backbone: nn.Module = model.module.get_submodule(model.plan.backbone)
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def compile_layers(model: LanguageModel) -> None:
    """Compiles each layer's forward pass in place, at its first call. The hooks that gather weights and the
    recomputation stay outside of the compiled code, and the names of the weights do not change.
    """
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
    """Shards a student for training, in place: each rank has its rows of the master weights, in fp32 or in the dtype
    `weights`; they are gathered in `compute_dtype`, and gradients are summed (not averaged: the loss is a share of the
    global mean) in fp32.

    `model` is on the CPU in any dtype; weights are converted one unit at a time, so that no rank ever holds all of
    them.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if cpu_offload else OffloadPolicy()
    return _shard(model, world, weights, mp_policy=policy, offload_policy=offload)


def shard_teacher(model: LanguageModel, world: World) -> LanguageModel:
    """Shards a teacher for inference, in place, its weights unchanged. Once gathered its root stays whole: it is needed
    for every micro batch, and the layers take most of the memory.
    """
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
    """Converts the parameters of a unit that are still whole to `dtype`. Buffers keep a dtype of their own."""
    for parameter in unit.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's rows of a sharded tensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of_rank(rows: int, rank: int, size: int) -> range:
    """Returns the rows of a sharded tensor that a rank holds, as torch.chunk divides them: equal shares, rounded up; the
    last ranks have fewer or none.
    """
    share = -(-rows // size)
    return range(rows)[rank * share : (rank + 1) * share]


def rows_like(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns zeros of `shape`, sharded by rows as the parameter is; there are as many rows."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    rows = parameter.to_local()
    zeros = torch.zeros(rows.shape[0], *shape[1:], dtype=dtype, device=rows.device)
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
