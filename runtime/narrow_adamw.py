"""AdamW that computes in fp32 and stores weights and moments in fewer bits.

The implementation is our own and not a library's, for two guarantees: random rounding follows from the seed, the step
and the parameter, so that a training that was interrupted gives the same bytes; and moments are plain tensors of rows,
which checkpoints distribute over any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minitron.runtime.narrow import blocks_of, dequantize, quantize, round_stochastically
from minitron.runtime.order import mix
from minitron.runtime.sharding import local, rows_like

StateName = Literal["float32", "bfloat16", "int8"]

_SMALLEST = 4096
"""The number of elements below which moments stay in fp32: narrow moments of norms and biases would save little and
cost accuracy.
"""

_PART = 1 << 25
"""The number of elements that are updated at a time: the memory of a step beside weights, gradients and moments stays
under a GiB.
"""

_MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over weights in fp32 or bf16."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, states: StateName, bf16_weights: bool, seed: int, **settings: Any
    ) -> None:
        """Takes lr, betas and eps as `settings`; `seed` decides, with the step, how bf16 is rounded. `bf16_weights`:
        weights take bf16 values, whatever dtype they are stored in.
        """
        super().__init__(groups, {"weight_decay": 0.0, **settings})
        self.states, self.bf16_weights, self.seed = states, bf16_weights, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any], number: int) -> None:
        assert parameter.grad is not None
        step, moments, generator = self.begin(parameter, number)
        weight, gradient = local(parameter.detach()), local(parameter.grad)
        rows = max(1, _PART // max(1, weight[0].numel() if weight.ndim and len(weight) else 1))
        for start in range(0, weight.shape[0] if weight.ndim else 1, rows):
            part: Any = slice(start, start + rows) if weight.ndim else ...
            pieces = {key: moment[part] for key, moment in moments.items()}
            exact = _next(weight[part], gradient[part], pieces, group, step, generator)
            weight[part].copy_(round_stochastically(exact, generator) if self.bf16_weights else exact)

    def begin(self, parameter: torch.nn.Parameter, number: int) -> tuple[int, dict[str, Tensor], torch.Generator]:
        """Counts a step of a parameter, the one with this `number`. Returns the count, this rank's rows of its moments, and
        where random rounding is drawn from."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the host: nothing waits for the device to read it
            state |= self.zeros(parameter)
        elif state["step"].device.type != "cpu":  # as a checkpoint was read
            state["step"] = state["step"].cpu()
        state["step"] += 1
        step = int(state["step"])
        moments = {key: local(value) for key, value in state.items() if key != "step"}
        rank = parameter.device_mesh.get_local_rank() if isinstance(parameter, DTensor) else 0
        device = local(parameter).device
        return step, moments, torch.Generator(device).manual_seed(mix(self.seed, step, number, rank) >> 1)

    def kept(self, parameter: torch.nn.Parameter) -> tuple[tuple[str, bool], ...]:
        """The moments of a parameter: their names, and whether they have a sign."""
        return _MOMENTS

    def zeros(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """Returns the moments of a parameter before its first update."""
        dtype = torch.bfloat16 if self.states == "bfloat16" else torch.float32
        if parameter.ndim < 2 or parameter.numel() < _SMALLEST:
            dtype = torch.float32
        elif self.states == "int8":
            scales = blocks_of(tuple(parameter.shape))
            found = {}
            for key, signed in self.kept(parameter):
                found[key] = rows_like(parameter, tuple(parameter.shape), torch.uint8)
                found[f"{key}_scale"] = rows_like(parameter, scales, torch.float32)
                # The code of 0 is not 0 where numbers have a sign.
                quantize(torch.zeros_like(local(found[key]), dtype=torch.float32), signed,
                         local(found[key]), local(found[f"{key}_scale"]))  # fmt: skip
            return found
        return {key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for key, _ in self.kept(parameter)}


def _next(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """Updates the moments of some rows in place and returns their weights in fp32."""
    gradient = gradient.float()
    moments = [
        follow(state, key, signed, beta, value, generator) / (1.0 - beta**step)
        for (key, signed), beta, value in zip(_MOMENTS, group["betas"], (gradient, gradient.square()), strict=True)
    ]
    decayed: Tensor = weight.float() * (1.0 - group["lr"] * group["weight_decay"])
    return decayed.addcdiv_(moments[0], moments[1].sqrt_().add_(group["eps"]), value=-group["lr"])


# parameters: a moment is stored in up to two tensors of the state, and its rounding is drawn
def follow(
    state: dict[str, Tensor], key: str, signed: bool, beta: float, new: Tensor, generator: torch.Generator
) -> Tensor:
    """Moves some rows of a moment towards `new` by 1 - `beta`, in place, in the dtype that they are stored in. Returns the
    moment in fp32, before it was rounded."""
    stored = state[key]
    narrow = stored.dtype == torch.uint8
    moment = dequantize(stored, signed, state[f"{key}_scale"]) if narrow else stored.float()
    moment = torch.lerp(moment, new, 1.0 - beta)
    if narrow:
        quantize(moment, signed, stored, state[f"{key}_scale"])
    else:
        stored.copy_(round_stochastically(moment, generator) if stored.dtype == torch.bfloat16 else moment)
    return moment
