"""Linear layers whose products are computed in float8, by torchao: e4m3 for values, weights and gradients, with a scale, a
power of two, for each row that a product sums over (rowwise scaling).

The student's weights stay what they are and are rounded for each product, forward and backward (Micikevicius et al., FP8
Formats for Deep Learning, arXiv 2209.05433). The teacher's, which never change, are rounded once and held so. On a CPU torchao
emulates: the same rounding, and products in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minitron.runtime.logs import without_logs
from minitron.runtime.models import LanguageModel
from minitron.runtime.sharding import decoder_layers
from minitron.specs.errors import Problem, Refused
from minitron.specs.float8 import CAPABILITY, MULTIPLE, Compute, counts_of_experts, fits_float8, missing_library
from minitron.specs.training_plan import TrainingPlan, needs_teacher

_RECIPE = "rowwise"

TEACHER = "teacher.compute"


def student_computes_in(plan: TrainingPlan, device: torch.device) -> Compute:
    """Returns what the linear layers of the student's decoder layers compute in on a device."""
    return "float8" if getattr(plan.compute_dtype, device.type) == "float8" else "bfloat16"


def require_float8(plan: TrainingPlan, device: torch.device, *, student: bool = True) -> None:
    """Checks that library and device can do what the plan computes in float8; `student`: it is trained now. Refused where one
    cannot, before anything long."""
    uses: list[tuple[Compute, str]] = []
    if student:
        uses.append((student_computes_in(plan, device), f"compute_dtype.{device.type}"))
    if needs_teacher(plan) or plan.teacher_logits != "online":
        uses.append((plan.teacher.compute, TEACHER))
    if problems := list(float8_problems(uses, device)):
        raise Refused(problems)


def float8_problems(uses: Sequence[tuple[Compute, str]], device: torch.device) -> Iterator[Problem]:
    """Yields a problem for each use, a value and its place, that library or device cannot compute."""
    yield from (missing := list(missing_library(*uses)))
    asked = [at for compute, at in uses if compute == "float8"]
    if missing or not asked or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name, wanted = torch.cuda.get_device_name(device), ".".join(map(str, CAPABILITY))
        message = f"{name} has compute capability {capability[0]}.{capability[1]}, and float8 needs {wanted} or later"
        yield from (Problem(at, message, "write bfloat16") for at in asked)


def float8_linears(model: LanguageModel, at: str) -> dict[str, nn.Linear]:
    """Returns the linear layers that are computed in float8, by their names in the model. Refused where there is none, at the
    place `at`."""
    experts = counts_of_experts(model.module.config.to_dict())
    names = {id(module): name for name, module in model.module.named_modules()}
    found = {}
    for layer in decoder_layers(model):
        for path, linear in layer.named_modules():
            if type(linear) is nn.Linear:
                rows, columns = linear.weight.shape
                if fits_float8(path, rows, columns, experts):
                    found[names[id(linear)]] = linear
    if not found:
        message = f"no linear layer inside of a decoder layer has sizes that are multiples of {MULTIPLE}"
        raise Refused([Problem(at, message, "write bfloat16")])
    return found


def compute_student_in_float8(model: LanguageModel, device: torch.device, plan: TrainingPlan) -> None:
    """Makes the linear layers of a student compute in float8, in place; parameters and their names stay."""
    with _quiet():
        from torchao.float8 import convert_to_float8_training

    chosen = {id(linear) for linear in float8_linears(model, f"compute_dtype.{device.type}").values()}
    # The gradient of a weight sums over the tokens of a micro batch: their number must be such a multiple too, or is padded.
    uneven = any(phase.sequence_length % MULTIPLE for phase in plan.course)
    config = replace(_config(device), pad_inner_dim=uneven)
    for layer in decoder_layers(model):
        convert_to_float8_training(layer, config=config, module_filter_fn=lambda module, _: id(module) in chosen)


def hold_teacher_in_float8(model: LanguageModel, device: torch.device, rounded_on: torch.device) -> None:
    """Replaces the linear layers of a frozen teacher, in place, by ones that hold their weights in float8 and compute on
    `device`; the weights are rounded on the device `rounded_on`, and lie there."""
    config = _config(device)
    # torch.compile does not look inside, as torchao has it for its own function.
    torch.compiler.allow_in_graph(_product)  # type: ignore[no-untyped-call]
    for name, linear in float8_linears(model, TEACHER).items():
        above, _, own = name.rpartition(".")
        setattr(model.module.get_submodule(above), own, Float8Weight(linear, config, rounded_on))


class Float8Weight(nn.Module):
    """A linear layer without gradients that holds its weight [out, in] in float8 and a scale for each row.

    The weight is not called `weight`: code that reads a weight itself, and cannot know float8, finds none instead of wrong
    numbers.
    """

    def __init__(self, linear: nn.Linear, config: Any, rounded_on: torch.device) -> None:
        super().__init__()
        self._config = config
        rounded = self._rounded(linear.weight.detach().to(rounded_on))
        self.in_features, self.out_features, self._dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.float8_weight = nn.Parameter(rounded._data.t(), requires_grad=False)
        self.float8_scale = nn.Parameter(rounded._scale.t(), requires_grad=False)
        self.bias = linear.bias

    @torch.no_grad()
    def _rounded(self, weight: Tensor) -> Any:
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic

        cast = self._config.cast_config_weight
        return hp_tensor_to_float8_dynamic(
            weight.t(),
            cast.target_dtype,
            _products(self._config),
            gemm_input_role=_role(),
            scaling_granularity=cast.scaling_granularity,
            axiswise_dim=0,
            round_scales_to_power_of_2=self._config.round_scales_to_power_of_2,
        )

    def forward(self, values: Tensor) -> Tensor:
        result = _product(values, self.float8_weight, self.float8_scale, self._dtype, self._config)
        return result if self.bias is None else result + self.bias


def _product(values: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, config: Any) -> Tensor:
    """Returns `values` [..., in] times a rounded weight [out, in] with scales [out, 1]."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import Float8TrainingTensor

    products = _products(config)
    rounded = Float8TrainingTensor(weight.t(), scale.t(), dtype, products, _role(), axiswise_dim=0)
    result: Tensor = matmul_with_hp_or_float8_args.apply(values, rounded, products, config)
    return result


def _config(device: torch.device) -> Any:
    with _quiet():
        from torchao.float8 import Float8LinearConfig

    return replace(Float8LinearConfig.from_recipe_name(_RECIPE), emulate=device.type == "cpu")


def _products(config: Any) -> Any:
    """Returns the settings of the three products of a linear layer, in torchao's form."""
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    of_each = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    return LinearMMConfig(
        *(ScaledMMConfig(config.emulate, one.use_fast_accum, False, config.pad_inner_dim) for one in of_each)
    )


def _role() -> Any:
    from torchao.float8.float8_training_tensor import GemmInputRole

    return GemmInputRole.WEIGHT


def _quiet() -> AbstractContextManager[None]:
    """Silences what torchao logs when it is imported: that kernels of other devices and products could not be loaded."""
    return without_logs(logging.WARNING)
