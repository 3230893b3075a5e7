"""Runs one Triton kernel from the logits of both models to the value and the gradient of the loss.

A program takes one row. It reads the row twice: once for the log-sum-exps of both models (an online softmax: running
maximum and sum, tile by tile), and once for value and gradient. The third access writes the gradient, in the dtype of
the products that follow. The Jensen-Shannon divergence alone reads a third time, because its gradient needs a mean over
the row that itself needs both log-sum-exps; that of the reverse KL follows from sums that the first reading makes.
Everything between reading and writing is fp32, whatever the logits are.

`docs/performance.md` counts the bytes. `rows.py` says the same in torch's operations and is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitron.runtime.loss.head import Head
from minitron.runtime.loss.sampled import SampledTargets
from minitron.runtime.loss.settings import DistillationLoss

NONE, FORWARD_KL, REVERSE_KL, JSD, SAMPLED = (tl.constexpr(code) for code in range(5))
_CODES = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "jsd": JSD}

TILE = 4096
"""Logits of one model that a program has in flight: 16 KiB, and as many of the other. Four programs of eight warps on a
multiprocessor are 128 KiB, four times what hides the latency of an H200's memory at its full rate."""

WARPS = 8


# parameters: a kernel takes pointers, sizes and constants one by one
@triton.jit  # type: ignore[untyped-decorator]
def _logits(base, bias, columns, inside, scale, cap, BIASED: tl.constexpr, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Computes a tile of logits and of d logits / d z: columns outside of the row are -inf."""
    z = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if BIASED:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z = z * scale
    slope = scale
    if CAPPED:
        # tanh from one exponential that cannot overflow
        small = tl.exp(-2.0 * tl.abs(z) / cap)
        tanh = tl.where(z < 0, -1.0, 1.0) * ((1.0 - small) / (1.0 + small))
        slope = scale * (1.0 - tanh * tanh)
        z = tl.where(inside, cap * tanh, float("-inf"))
    return z, slope


@triton.jit
def _online(values, maximum, total):  # type: ignore[no-untyped-def]
    """Returns the running maximum and the sum of exp(value - maximum) after one more tile, the factor for sums over
    earlier tiles, and the tile's exponentials. A row that begins with -inf has no maximum yet; exponents are then taken
    from 0."""
    largest = tl.maximum(maximum, tl.max(values, 0))
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    powers = tl.exp(values - origin)
    factor = tl.exp(maximum - origin)
    return largest, total * factor + tl.sum(powers, 0), factor, powers


@triton.jit
def _difference(minuend, subtrahend):  # type: ignore[no-untyped-def]
    """Subtracts log-probabilities: a token that is impossible to both models does not set them apart."""
    both = (minuend == float("-inf")) & (subtrahend == float("-inf"))
    return tl.where(both, 0.0, minuend - subtrahend)


@triton.jit
def _halves(log_p, log_q):  # type: ignore[no-untyped-def]
    """Computes -log p/m and -log q/m for m = (p + q) / 2, and the summand of 2 JSD = sum of -(p log p/m + q log q/m)
    negated.

    With d = log q - log p both are log((1 + e^d) / 2) and that minus d. Near d = 0 the summand's first order cancels between
    p and q: there it is taken from log cosh(d/2), whose series begins with the second order."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    d = _difference(log_q, log_p)
    near = tl.abs(d) < 0.5
    half = tl.where(near, 0.5 * d, 0.0)
    square = half * half
    log_cosh = square * (0.5 - square * (1.0 / 12 - square * (1.0 / 45 - square * (17.0 / 2520))))
    tail = tl.log(1.0 + tl.exp(-tl.abs(d))) - 0.6931471805599453
    of_p = tl.where(near, half + log_cosh, tl.maximum(d, 0.0) + tail)
    of_q = tl.where(near, log_cosh - half, tl.maximum(-d, 0.0) + tail)
    of_p = tl.where(p > 0.0, of_p, 0.0)
    of_q = tl.where(q > 0.0, of_q, 0.0)
    summand = tl.where(near, (p - q) * half + (p + q) * log_cosh, p * of_p + q * of_q)
    return p, of_p, summand


# parameters: a kernel takes pointers, sizes and constants one by one
@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    z_ptr, t_ptr, out_ptr, z_bias, t_bias, labels, valid, ids, weights, values,
    z_stride, t_stride, out_stride, ids_stride, values_stride, vocabulary, samples,
    z_scale, z_cap, t_scale, t_cap, per_temperature, divergence_factor, cross_factor,
    DIVERGENCE: tl.constexpr, TEACHER: tl.constexpr, CROSS: tl.constexpr, TEMPERED: tl.constexpr, MASKED: tl.constexpr,
    Z_BIASED: tl.constexpr, Z_CAPPED: tl.constexpr, T_BIASED: tl.constexpr, T_CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    minus_inf = float("-inf")
    row = tl.program_id(0).to(tl.int64)
    z_row, t_row, out_row = z_ptr + row * z_stride, t_ptr + row * t_stride, out_ptr + row * out_stride
    lanes = tl.arange(0, TILE)
    # A row that is masked is not read.
    width = vocabulary
    if MASKED:
        width = tl.where(tl.load(valid + row) != 0, vocabulary, 0)

    # First reading: log-sum-exps, as maximum and log of the sum: their difference between the models is exact.
    z_max, z_sum, cross_max, cross_sum, t_max, t_sum, mixed = minus_inf, 0.0, minus_inf, 0.0, minus_inf, 0.0, 0.0
    for start in range(0, WIDTH, TILE):
        columns = start + lanes
        inside = columns < width
        z, _ = _logits(z_row, z_bias, columns, inside, z_scale, z_cap, Z_BIASED, Z_CAPPED)
        if CROSS and TEMPERED:
            cross_max, cross_sum, _, _ = _online(z, cross_max, cross_sum)
        u = z * per_temperature
        z_max, z_sum, factor, powers = _online(u, z_max, z_sum)
        if TEACHER:
            w, _ = _logits(t_row, t_bias, columns, inside, t_scale, t_cap, T_BIASED, T_CAPPED)
            w = w * per_temperature
            t_max, t_sum, _, _ = _online(w, t_max, t_sum)
            if DIVERGENCE == REVERSE_KL:
                mixed = mixed * factor + tl.sum(tl.where(powers > 0.0, powers * _difference(u, w), 0.0), 0)
    z_log = tl.log(z_sum)
    t_log = tl.log(t_sum)
    if CROSS and TEMPERED:
        cross_log = tl.log(cross_sum)
    else:
        cross_max, cross_log = z_max, z_log
    value = 0.0
    mean = 0.0
    if DIVERGENCE == REVERSE_KL:
        value = mixed / z_sum - ((z_max - t_max) + (z_log - t_log))

    if DIVERGENCE == JSD:
        sums = tl.zeros([TILE], dtype=tl.float32)
        means = tl.zeros([TILE], dtype=tl.float32)
        for start in range(0, WIDTH, TILE):
            columns = start + lanes
            inside = columns < width
            z, _ = _logits(z_row, z_bias, columns, inside, z_scale, z_cap, Z_BIASED, Z_CAPPED)
            w, _ = _logits(t_row, t_bias, columns, inside, t_scale, t_cap, T_BIASED, T_CAPPED)
            p, of_p, summand = _halves(z * per_temperature - z_max - z_log, w * per_temperature - t_max - t_log)
            sums += summand
            means += p * of_p
        value = -0.5 * tl.sum(sums, 0)
        mean = tl.sum(means, 0)

    label = tl.full([], -1, tl.int64)
    if CROSS:
        label = tl.load(labels + row).to(tl.int64)
    if DIVERGENCE == SAMPLED:
        # Before the gradient may take the place of the logits.
        places = tl.arange(0, SAMPLES)
        drawn = places < tl.where(width > 0, samples, 0)
        weight = tl.load(weights + row * ids_stride + places, mask=drawn, other=0.0).to(tl.float32)
        drawn = drawn & (weight > 0.0)
        token = tl.load(ids + row * ids_stride + places, mask=drawn, other=0).to(tl.int64)
        z_drawn, slope_drawn = _logits(z_row, z_bias, token, drawn, z_scale, z_cap, Z_BIASED, Z_CAPPED)
        log_p_drawn = z_drawn * per_temperature - z_max - z_log
        value = -tl.sum(tl.where(drawn, weight * log_p_drawn, 0.0), 0)
        at_samples = divergence_factor * (tl.exp(log_p_drawn) - weight)
        if CROSS:
            p_drawn = tl.exp(z_drawn - cross_max - cross_log)
            at_samples += cross_factor * (p_drawn - tl.where(token == label, 1.0, 0.0))
        at_samples *= slope_drawn
    cross = 0.0
    if CROSS:
        z_label, _slope = _logits(z_row, z_bias, label, label < width, z_scale, z_cap, Z_BIASED, Z_CAPPED)
        cross = -(z_label - cross_max - cross_log)

    # Second reading: value and gradient.
    sums = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, WIDTH, TILE):
        columns = start + lanes
        inside = columns < width
        z, slope = _logits(z_row, z_bias, columns, inside, z_scale, z_cap, Z_BIASED, Z_CAPPED)
        gradient = tl.zeros([TILE], dtype=tl.float32)
        log_p = z * per_temperature - z_max - z_log
        if TEACHER:
            w, _ = _logits(t_row, t_bias, columns, inside, t_scale, t_cap, T_BIASED, T_CAPPED)
            log_q = w * per_temperature - t_max - t_log
            if DIVERGENCE == FORWARD_KL:
                q = tl.exp(log_q)
                sums += tl.where(q > 0.0, q * _difference(log_q, log_p), q)
                gradient = tl.exp(log_p) - q
            elif DIVERGENCE == REVERSE_KL:
                p = tl.exp(log_p)
                gradient = tl.where(p > 0.0, p * (_difference(log_p, log_q) - value), p)
            else:
                p, of_p, _ = _halves(log_p, log_q)
                gradient = -0.5 * p * (of_p - mean)
        if DIVERGENCE == SAMPLED:
            gradient = tl.exp(log_p)
        gradient = gradient * divergence_factor
        if CROSS:
            gradient += cross_factor * (tl.exp(z - cross_max - cross_log) - tl.where(columns == label, 1.0, 0.0))
        gradient = tl.where(inside, gradient * slope, 0.0)
        tl.store(out_row + columns, gradient.to(out_ptr.dtype.element_ty), mask=columns < vocabulary)
    if DIVERGENCE == FORWARD_KL:
        value = tl.sum(sums, 0)
    if DIVERGENCE == SAMPLED:
        # The store above may have come from another thread.
        tl.debug_barrier()
        tl.store(out_row + token, at_samples.to(out_ptr.dtype.element_ty), mask=drawn)
    tl.store(values + row, tl.where(width > 0, value, 0.0))
    tl.store(values + values_stride + row, tl.where(width > 0, cross, 0.0))


class TritonRows:
    """Turns chunks of logits into values and gradients, as `TorchRows` does, in one kernel."""

    def __init__(self, settings: DistillationLoss, student: Head, teacher: Head | None, share: float) -> None:
        """Prepares buffers; `share` is the weight of one token in the global mean."""
        self.settings, self.student, self.teacher, self.share = settings, student, teacher, share

    def to_gradient(
        self,
        z_CV: Tensor,
        teacher: Tensor | SampledTargets | None,
        labels_C: Tensor | None,
        valid_C: Tensor | None,
        out_CV: Tensor,
        values_2C: Tensor,
    ) -> None:
        """Writes d loss / d z_CV to `out_CV`, which may be `z_CV` itself, and each token's divergence (with samples:
        its cross-entropy with them) and -log p(label) to `values_2C`. Rows that are not valid get zeros, whatever their
        logits are."""
        rows, vocabulary = z_CV.shape
        settings, student = self.settings, self.student
        cross = settings.cross_entropy != 0 and labels_C is not None
        sampled = teacher if isinstance(teacher, SampledTargets) else None
        logits = teacher if isinstance(teacher, Tensor) else None
        theirs = self.teacher if logits is not None else None
        code = NONE if teacher is None else SAMPLED if sampled is not None else _CODES[settings.divergence]
        samples = 0 if sampled is None else sampled.ids_TN.shape[1]
        pointers: tuple[Any, ...] = (
            z_CV, z_CV if logits is None else logits, out_CV,
            student.bias_V, None if theirs is None else theirs.bias_V,
            labels_C if cross else None, None if valid_C is None else valid_C.view(torch.uint8),
            None if sampled is None else sampled.ids_TN.contiguous(),
            None if sampled is None else sampled.weights_TN.contiguous(),
            values_2C,
        )  # fmt: skip
        _kernel[(rows,)](
            *pointers,
            z_CV.stride(0), 0 if logits is None else logits.stride(0), out_CV.stride(0), samples, values_2C.stride(0),
            vocabulary, samples,
            float(student.scale), float(student.softcap or 1.0),
            1.0 if theirs is None else float(theirs.scale),
            float((theirs.softcap if theirs is not None else None) or 1.0),
            1.0 / settings.temperature,
            # temperature^2 of the loss, one of them cancelled by d (logits / temperature) / d logits
            settings.weight * settings.temperature * self.share, settings.cross_entropy * self.share,
            DIVERGENCE=code.value, TEACHER=logits is not None, CROSS=cross,
            TEMPERED=settings.temperature != 1.0, MASKED=valid_C is not None,
            Z_BIASED=student.bias_V is not None, Z_CAPPED=student.softcap is not None,
            T_BIASED=theirs is not None and theirs.bias_V is not None,
            T_CAPPED=theirs is not None and theirs.softcap is not None,
            WIDTH=triton.cdiv(vocabulary, TILE) * TILE, TILE=TILE, SAMPLES=triton.next_power_of_2(max(1, samples)),
            num_warps=WARPS,
        )  # fmt: skip
