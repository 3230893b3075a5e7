"""Muon for the matrices of the decoder layers: the momentum of a matrix, made orthogonal, is its update.

With the singular value decomposition of the momentum (Nesterov's) being U S V^T, the update is close to U V^T: all directions
that gradients point in are followed equally far (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024).
It is scaled by 0.2 sqrt(max(rows, columns)), so that its entries are about as large as those of AdamW's updates, and learning
rate and weight decay are AdamW's (Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 2.2). Embedding,
head, norms and biases are updated by AdamW, as there.

A matrix has one moment instead of two. The implementation is our own for what `torch.optim.Muon` leaves out: stacked experts,
weights whose rows are spread over ranks, moments and weights in fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from minitron.runtime.models import LanguageModel
from minitron.runtime.narrow import round_stochastically
from minitron.runtime.narrow_adamw import NarrowAdamW, follow
from minitron.runtime.sharding import decoder_layers, local, rows_of_rank
from minitron.specs.blocks.training import is_matrix

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The coefficients of the quintic iteration, the steepest at 0 that takes singular values to about 1 (Jordan et al., 2024)."""

_ITERATIONS = 5

_SCALE = 0.2
"""The root mean square of the entries of AdamW's updates, as it was found in trainings (arXiv 2502.16982, section 2.2)."""

_TINY = 1e-7

_MOMENT = (("exp_avg", True),)


def layer_matrices(model: LanguageModel) -> list[torch.nn.Parameter]:
    """Returns the trained matrices of the decoder layers, and stacks of them, in order. What lies outside the layers
    (embedding, head) is left to AdamW."""
    found = (parameter for layer in decoder_layers(model) for parameter in layer.parameters())
    return list(dict.fromkeys(one for one in found if one.requires_grad and is_matrix(one.shape)))


class Muon(NarrowAdamW):
    """Muon for the groups that are marked `orthogonal`, AdamW for the others."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, **settings: Any) -> None:
        """Takes what `NarrowAdamW` takes, and the decay rate of a matrix's momentum."""
        super().__init__(groups, **settings)
        self.momentum = momentum
        self._orthogonal = {
            parameter for group in self.param_groups if group.get("orthogonal") for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        number = 0
        for group in self.param_groups:
            waiting: list[tuple[int, torch.nn.Parameter]] = []
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                if parameter not in self._orthogonal:
                    self._update(parameter, group, number)
                    continue
                waiting.append((number, parameter))
                if len(waiting) == _owners(parameter):
                    self._turn(waiting, group)
                    waiting = []
            if waiting:
                self._turn(waiting, group)

    def kept(self, parameter: torch.nn.Parameter) -> tuple[tuple[str, bool], ...]:
        return _MOMENT if parameter in self._orthogonal else super().kept(parameter)

    def _turn(self, numbered: list[tuple[int, torch.nn.Parameter]], group: dict[str, Any]) -> None:
        """Updates matrices, at most as many as there are ranks that their rows are spread over."""
        directions, generators = [], []
        for number, parameter in numbered:
            _, moments, generator = self.begin(parameter, number)
            assert parameter.grad is not None
            gradient = local(parameter.grad).float()
            moment = follow(moments, "exp_avg", True, self.momentum, gradient, generator)
            directions.append(torch.lerp(gradient, moment, self.momentum))
            generators.append(generator)
        parameters = [parameter for _, parameter in numbered]
        for parameter, turned, generator in zip(
            parameters, self._turned(parameters, directions), generators, strict=True
        ):
            weight = local(parameter.detach())
            exact = weight.float() * (1.0 - group["lr"] * group["weight_decay"])
            exact.add_(turned.to(exact), alpha=-group["lr"] * _SCALE * max(parameter.shape[-2:]) ** 0.5)
            weight.copy_(round_stochastically(exact, generator) if self.bf16_weights else exact)

    def _turned(self, parameters: list[torch.nn.Parameter], rows: list[Tensor]) -> list[Tensor]:
        """Returns the orthogonal matrices [rows of this rank, ...] that are nearest to what all ranks hold the `rows` of."""
        dtype = torch.bfloat16 if rows[0].device.type == "cuda" else torch.float32
        ready = [one.to(dtype) for one in rows]
        if _owners(parameters[0]) == 1:
            return [orthogonalise(one) for one in ready]
        mesh = parameters[0].device_mesh  # type: ignore[attr-defined]
        rank, size, group = mesh.get_local_rank(), mesh.size(), mesh.get_group()
        # The matrix with place n in the list is turned by rank n: each rank sends its rows and has them back.
        given = [one.numel() for one in ready] + [0] * (size - len(ready))
        own = parameters[rank].shape if rank < len(parameters) else torch.Size((0, 0))
        held = [len(rows_of_rank(own[0], other, size)) * own[1] for other in range(size)]
        whole = _exchange(torch.cat([one.flatten() for one in ready]), given, held, group)
        if whole.numel():
            whole = orthogonalise(whole.view(own)).flatten()
        back = torch.split(_exchange(whole, held, given, group), given)
        return [part.view_as(one) for part, one in zip(back, ready, strict=False)]


def _owners(parameter: torch.nn.Parameter) -> int:
    """The number of ranks that a matrix's rows are spread over. A stack is spread by whole matrices."""
    return parameter.device_mesh.size() if isinstance(parameter, DTensor) and parameter.ndim == 2 else 1


def _exchange(flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Sends the next `sent[n]` elements to each rank n, and returns what each has sent here, in the order of the ranks."""
    found = flat.new_empty(sum(received))
    dist.all_to_all_single(found, flat.contiguous(), received, sent, group=group)
    return found


def orthogonalise(matrix: Tensor) -> Tensor:
    """Returns the matrix or the stack of matrices [..., rows, columns] with all singular values near 1: Newton-Schulz
    iterations on the matrix over its Frobenius norm, in its own dtype. A matrix of zeros stays one."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp_min(_TINY).to(x.dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
