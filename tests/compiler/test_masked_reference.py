"""Norms and moments of what is kept are those of a shorter vector, whatever stands where something is gone."""

from __future__ import annotations

import numpy as np
import torch

from minitron.compiler.verify.masked_reference import fill, moment, normalise

GONE = np.array([[False, True, False, False, True, False]])
PACKED = (np.packbits(GONE).tobytes(), GONE.shape)
KEPT = torch.tensor([0, 2, 3, 5])


def value() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) + 3


def test_a_layer_norm_and_a_norm_without_a_mean() -> None:
    weight, bias = torch.rand(6) + 0.5, torch.rand(6)
    got = normalise(value(), PACKED, 1, weight, bias, 1e-5, True)
    wanted = torch.nn.functional.layer_norm(value()[:, KEPT], (4,), weight[KEPT], bias[KEPT], 1e-5)
    torch.testing.assert_close(got[:, KEPT], wanted)
    assert not got[:, [1, 4]].any()
    got = normalise(value(), PACKED, 1, weight, None, 1e-6, False)
    torch.testing.assert_close(got[:, KEPT], torch.nn.functional.rms_norm(value()[:, KEPT], (4,), weight[KEPT], 1e-6))


def test_a_variance_and_a_standard_deviation() -> None:
    torch.testing.assert_close(moment(value(), PACKED, (1,), 1.0, True, False), value()[:, KEPT].var(1, keepdim=True))
    got = moment(value(), PACKED, (1,), 0.0, False, True)
    torch.testing.assert_close(got, value()[:, KEPT].std(1, correction=0))


def test_a_number_that_a_dtype_has_not_is_its_nearest() -> None:
    whole = torch.arange(6).reshape(1, 6)
    assert int(fill(whole, PACKED, float("-inf"))[0, 1]) == torch.iinfo(torch.int64).min
    assert not fill(whole > 0, PACKED, 0.0)[0, 1]
