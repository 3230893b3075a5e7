"""The memory of what a calibration accumulates, from shapes alone: sums for each axis, covariances, Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from minitron.compiler.axes.dims import Dim
from minitron.compiler.importance.elimination import PUT_OFF, Elimination
from minitron.compiler.importance.taps import CalibrationConfig, norm_outputs
from minitron.compiler.roles.analysed import AnalysedTeacher

FP32, FP64 = 4, 8
# Matrices in fp64 of the size of a Gram matrix that elimination works with beside it: regularised, its factors, its inverse;
# and blocks of columns whose updates are put off: three, and what is left of them.
ELIMINATING, COLUMNS = 3, 6


@dataclass(frozen=True)
class Accumulated:
    """Bytes.

    kept      sums, the covariance of the residual stream and products of experts, from the first batch to the last
    ending    these, the covariance before a tied head, which comes last, and the means of both
    covering  the product of one batch for a covariance, in fp32 and then in fp64, before it is added
    grams     Gram matrices of one layer's projections, while the layer runs
    adding    the product of one batch for a Gram matrix
    settling  what elimination takes on the CPU beside a layer's Gram matrices, once the layer has run
    """

    kept: int = 0
    ending: int = 0
    covering: int = 0
    grams: int = 0
    adding: int = 0
    settling: int = 0


def accumulated(teacher: AnalysedTeacher, config: CalibrationConfig) -> Accumulated:
    """The memory that the accumulators of `Taps` take."""
    hidden = teacher.roles.hidden.size
    covariance, of_head = (FP64 * hidden**2 * (one is not None) for one in (config.sites or None, config.head_site))
    sums = sum(_sums(teacher)) + sum(_of_experts(teacher, config))
    by_layer: dict[str, int] = {}
    largest = settling = 0
    for key, written, read in _eliminated(teacher) if config.greedy else ():
        layer = key.rpartition(".")[2]
        by_layer[layer] = by_layer.get(layer, 0) + FP64 * read**2
        largest = max(largest, read)
        eliminating = ELIMINATING * FP64 * read**2 + COLUMNS * PUT_OFF * FP64 * read
        settling = max(settling, eliminating, 2 * FP64 * read**2 + (FP32 + FP64) * written * read)
    product = FP32 + FP64
    covering = product * hidden**2 if config.sites else 0
    kept, ending = sums + covariance, sums + 2 * (covariance + of_head)
    return Accumulated(kept, ending, covering, max(by_layer.values(), default=0), product * largest**2, settling)


def _sums(teacher: AnalysedTeacher) -> Iterator[int]:
    """The bytes of the sums and sums of squares that score an axis, in fp32."""
    roles = teacher.roles
    for node in norm_outputs(teacher.captured, roles):
        yield 2 * FP32 * _channels(node)
    for reader in (one for site in roles.heads.values() for one in site.readers[:1]):
        yield 2 * FP32 * _channels(reader.value)
    for layers in roles.widths.values():
        for layer, width in layers.items():
            mixture = roles.mixtures.get(layer)
            lists = _count(mixture.experts) if mixture is not None and width.parents == mixture.experts else 1
            yield from (2 * FP32 * lists * _channels(reader.value) for reader in width.readers[:1])


def _of_experts(teacher: AnalysedTeacher, config: CalibrationConfig) -> Iterator[int]:
    """The bytes of what is known of the experts of each layer, in fp64."""
    for mixture in teacher.roles.mixtures.values():
        if mixture.told_apart:
            experts = _count(mixture.experts)
            outputs = teacher.roles.hidden.size if config.experts else 0
            yield FP64 * experts * (2 + outputs + (experts if config.greedy else 0))


def _eliminated(teacher: AnalysedTeacher) -> Iterator[tuple[str, int, int]]:
    """Each axis that is ranked by elimination, with the sizes [written, read] of the projection behind it."""

    def no_weight(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is not needed for its size")

    for key, reader in Elimination(teacher.table, teacher.roles, no_weight).sites():
        read = _channels(reader.value)
        assert reader.weight is not None
        yield key, teacher.captured.model.get_parameter(reader.weight).numel() // read, read


def _channels(node: Node) -> int:
    return int(node.meta["val"].shape[-1])


def _count(experts: Dim) -> int:
    return math.prod(atom.size.coefficient for atom in experts)
