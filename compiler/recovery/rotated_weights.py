"""The teacher's weights in another basis of the residual stream: the same function, one weight for all channels of a norm."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from minitron.compiler.roles.rotation import Fold, Rotation
from minitron.compiler.weights.source import WeightSource, find_source

# Part of what identifies a student: another one where the same basis gives other weights.
DEFINITION = "norms folded up to their common multiplier"
# Rows of a matrix that are turned at a time, in float64: fewer where they are long, and enough to fill the cores.
BLOCK_ROWS, LEAST_ROWS, BLOCK_ELEMENTS = 8192, 256, 1 << 21


class RotatedWeights:
    """Yields each parameter in float32, rotated when it is asked for.

    `basis` is the orthogonal matrix [H, H] in float64 whose columns are the new coordinates. `replaced` are parameters, in the
    new basis already, that stand in the place of rotated ones.
    """

    def __init__(
        self,
        source: WeightSource,
        rotation: Rotation,
        basis: torch.Tensor,
        replaced: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.streamed = source.streamed
        self._source, self._rotation, self.basis = source, rotation, basis.double().cpu()
        self._replaced = replaced or {}

    @property
    def unrotated(self) -> WeightSource:
        """The teacher's weights in their own basis."""
        return self._source

    def get(self, name: str) -> torch.Tensor:
        if name in self._replaced:
            return self._replaced[name]
        weight = self._source.get(name)
        if name in self._rotation.folds:
            fold = self._rotation.folds[name]
            return torch.full(weight.shape, self.common_multiplier(fold) - fold.shift)
        if name not in self._rotation.axes:
            return weight
        norm = self._rotation.reads.get(name)
        return self._turned(name, weight, None if norm is None else self._rotation.folds[norm])

    def digest(self) -> str:
        """A hash of the basis, of what is replaced, and of how norms are folded."""
        digest = hashlib.sha256(DEFINITION.encode() + self.basis.numpy().tobytes())
        for name in sorted(self._replaced):
            digest.update(name.encode() + self._replaced[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def exact(self) -> RotatedWeights:
        """The same with nothing replaced."""
        return RotatedWeights(self._source, self._rotation, self.basis)

    def behind(self, name: str, fold: Fold) -> torch.Tensor:
        """The rotated parameter as it would be if it were read behind a norm only, with that norm's weight folded in."""
        return self._turned(name, self._source.get(name), fold)

    def _turned(self, name: str, weight: torch.Tensor, fold: Fold | None) -> torch.Tensor:
        """Turns the axes of a parameter in float64; a matrix a block of rows at a time, for an embedding may be large."""
        axes = self._rotation.axes[name]
        if weight.dim() == 2 and len(axes) == 1:
            along, turned = 1 - axes[0], torch.empty(weight.shape)
            size = min(BLOCK_ROWS, max(LEAST_ROWS, BLOCK_ELEMENTS // len(self.basis)))
            for start in range(0, weight.shape[along], size):
                count = min(size, weight.shape[along] - start)
                block = self._turn(axes, weight.narrow(along, start, count), fold)
                turned.narrow(along, start, count).copy_(block)
            return turned
        return self._turn(axes, weight, fold).contiguous()

    def _turn(self, axes: Sequence[int], weight: torch.Tensor, fold: Fold | None) -> torch.Tensor:
        exact = weight.double()
        if fold is not None:
            (axis,) = axes
            shape = [1] * exact.dim()
            shape[axis] = -1
            exact = exact * (self.multiplier(fold) / self.common_multiplier(fold)).reshape(shape)
        for axis in axes:
            exact = torch.tensordot(exact, self.basis, dims=([axis], [0])).movedim(-1, axis)
        return exact.float()

    def multiplier(self, fold: Fold) -> torch.Tensor:
        """Returns the factors that a norm of the teacher multiplies by, [H] in float64."""
        return self._source.get(fold.parameter).double() + fold.shift

    def common_multiplier(self, fold: Fold) -> float:
        """Returns the factor by which the rotated norm multiplies every channel: the root mean square of the teacher's.

        What is folded into projections is what channels differ in, and no more: norm weights of large models are far from
        one, 0.04 to 0.4 in one of 135M parameters, and a projection that takes them over whole has entries that a training
        step of a usual learning rate changes by more than they are.
        """
        return float(self.multiplier(fold).square().mean().sqrt()) or 1.0


def rotated_in(source: WeightSource) -> RotatedWeights | None:
    """Returns the rotated weights that a source is made of; None where it has none."""
    return find_source(source, RotatedWeights)


def principal_basis(covariance: torch.Tensor) -> torch.Tensor:
    """The eigenvectors [H, H] of a covariance, the largest eigenvalue first; the largest entry of each is positive, so that
    the basis is one of the two that fit on every machine."""
    vectors: torch.Tensor = torch.linalg.eigh(covariance.double().cpu())[1].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
