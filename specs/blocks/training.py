"""The parts common to every training in a spec: an optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from minitron.specs.blocks.base import Block, NonNegativeFloat, NonNegativeInt, PositiveFloat
from minitron.specs.blocks.choices import Rates

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Block):
    """The optimizer and its learning-rate schedule: a linear warm-up to `lr`, then a decay to `min_lr` at the last token."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: matrices of the decoder layers are updated by their momentum made orthogonal, on the scale of AdamW's updates
    (arXiv 2502.16982), with one moment instead of two; all else by AdamW."""

    lr: PositiveFloat = 1e-4
    """The highest learning rate."""

    min_lr: NonNegativeFloat = 4.5e-7
    """The learning rate at the end."""

    warmup_steps: NonNegativeInt = 60
    """Steps from 0 to `lr`. Left out: 60, and at most 2% of all steps."""

    schedule: Literal["cosine"] = "cosine"
    """The course from `lr` to `min_lr`."""

    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moments."""

    momentum: Beta = 0.95
    """Decay rate of the momentum of `muon`'s matrices; `adamw` has none."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    states: Literal["float32", "bfloat16", "int8"] = "float32"
    """The dtype of the two moments: 8, 4 or 2 bytes a parameter. `bfloat16` is rounded at random, `int8` by blocks of 256
    (arXiv 2110.02861); norms and biases stay in `float32`."""

    clip_grad_norm: PositiveFloat | None = 1.0
    """Gradients of a larger norm are scaled down to it; null: never."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Checks whether a parameter of a decoder layer is a matrix, or a stack of matrices, that `muon` makes orthogonal. The
    filters of channels, [C, 1, K], are not."""
    return len(shape) in (2, 3) and min(shape[-2:]) > 1


class CorrectionOptimizer(Optimizer):
    """The optimizer as under `distill`, with the defaults of the published teacher correction (arXiv 2408.11796)."""

    lr: PositiveFloat = 2e-5
    """The highest learning rate."""

    warmup_steps: NonNegativeInt = 120
    """Steps from 0 to `lr`. Left out: 120, and at most 2% of all steps."""


class DistillOptimizer(Optimizer):
    """The optimizer and its learning-rate schedule: a linear warm-up to `lr`, then a decay to `min_lr` at the last token."""

    # Wider than the rate of a training that runs: `at` gives that one.
    lr: Rates = 1e-4  # type: ignore[assignment]
    """The highest learning rate; under `search` a list or a range (`{min: 1e-3, max: 8e-3}`), of which the best is found."""

    def at(self, lr: float) -> Optimizer:
        """Returns the optimizer of a training at one learning rate."""
        values = {key: getattr(self, key) for key in Optimizer.model_fields} | {"lr": lr}
        return Optimizer.model_construct(_fields_set=set(self.model_fields_set), **values)


Kind = TypeVar("Kind", bound=Optimizer)
# A warm-up that is not written is at most this share of all steps.
WARMUP_SHARE = 0.02


def fit_warmup(optimizer: Kind, steps: int) -> Kind:
    """Returns the optimizer with a warm-up that suits `steps` steps, if none is written."""
    fitting = int(WARMUP_SHARE * steps)
    if "warmup_steps" in optimizer.model_fields_set or optimizer.warmup_steps <= fitting:
        return optimizer
    return optimizer.model_copy(update={"warmup_steps": fitting})
