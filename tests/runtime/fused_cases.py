"""The fused loss against the reference in torch and against fp64 autograd; `test_fused_loss.py` runs these in Triton's
interpreter, and on a machine with a GPU `pytest tests/runtime/fused_cases.py` runs them there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.runtime.loss import DistillationLoss, Head, SampledTargets, distillation, distillation_loss, fused
from minitron.runtime.loss.rows import TorchRows
from tests.runtime.test_distillation_loss import (
    Inputs,
    emulate_tensor_cores,
    error,
    rounded,
    terms,
)
from tests.runtime.test_sampled_loss import targets as sampled_targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
BF16_TOLERANCE = 2**-8 if DEVICE == "cuda" else 2**-7
"""A GPU rounds to the nearest bf16; the interpreter cuts the rest off."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "TILE", 128)


def normal(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(
    settings: DistillationLoss,
    z: Tensor,
    teacher: Tensor | SampledTargets | None,
    *,
    heads: tuple[Head, Head] | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """(Gradient, values) of the reference in torch and of the kernel, from the same logits."""
    rows, vocabulary = z.shape
    student, other = heads or (Head(torch.empty(vocabulary, 0, device=DEVICE)),) * 2
    theirs = other if isinstance(teacher, Tensor) else None
    found = []
    for kernel in (False, True):
        logits = z.float() if not kernel else z
        out = (logits if dtype == torch.float32 or not kernel else torch.empty_like(z, dtype=dtype)).clone().to(DEVICE)
        logits = out if out.dtype == torch.float32 else logits.clone().to(DEVICE)
        values = torch.full((2, rows), 77.0, device=DEVICE)
        made: Any = fused.TritonRows(settings, student, theirs, 0.25)
        if not kernel:
            made = TorchRows(settings, student, theirs, 0.25, rows)
        given = teacher.clone().to(DEVICE) if isinstance(teacher, Tensor) else teacher
        if isinstance(given, Tensor) and not kernel:
            given = given.float()
        there = [None if one is None else one.to(DEVICE) for one in (labels, valid)]
        made.to_gradient(logits, given, *there, out, values)
        found.append((out.double().cpu(), values.double().cpu()))
    return found


def agree(found: list[tuple[Tensor, Tensor]], tolerance: float = 1e-5, smallest: float = 0.0) -> None:
    (want, want_values), (got, got_values) = found
    assert bool(want.isfinite().all()) and bool(want_values.isfinite().all())
    assert float((got - want).norm()) <= tolerance * float(want.norm()) + smallest
    torch.testing.assert_close(got_values, want_values, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 501])
def test_vocabularies_that_no_tile_divides(divergence: Any, vocabulary: int) -> None:
    settings = DistillationLoss(divergence, temperature=2.0, weight=0.7, cross_entropy=0.3)
    z, t = normal(3, vocabulary, seed=1), normal(3, vocabulary, seed=2)
    agree(both(settings, z, t, labels=torch.arange(3) % vocabulary), smallest=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option(divergence: Any) -> None:
    vocabulary, labels = 300, torch.tensor([299, 128])
    weight, bias = torch.empty(vocabulary, 0, device=DEVICE), normal(vocabulary, seed=3).to(DEVICE)
    options = itertools.product([None, 5.0], [False, True], [1.0, 2.5], [0.0, 0.3], [0.0, 0.5])
    for softcap, biased, temperature, cross_entropy, weight_of in options:
        scale = 0.7 if biased else 1.0
        settings = DistillationLoss(divergence, temperature, weight_of, cross_entropy)
        student = Head(weight, bias if biased else None, scale, softcap)
        teacher = Head(weight, bias * 0.5 if biased else None, 0.5, None if softcap is None else 7.0)
        t = normal(2, vocabulary, seed=2) if weight_of else None
        z = normal(2, vocabulary, seed=1)
        agree(both(settings, z, t, heads=(student, teacher), labels=labels), smallest=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_row_in_any_dtype_of_logits_and_gradient(divergence: Any) -> None:
    z, t = normal(1, 257, seed=1).bfloat16(), normal(1, 257, seed=2).bfloat16()
    settings = DistillationLoss(divergence)
    agree(both(settings, z, t.float(), dtype=torch.bfloat16), tolerance=BF16_TOLERANCE)
    agree(both(settings, z, t, dtype=torch.bfloat16), tolerance=BF16_TOLERANCE)
    agree(both(settings, z.float(), t.float()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand(divergence: Any) -> None:
    z, t = normal(4, 300, seed=1, scale=1e4), normal(4, 300, seed=2, scale=1e4)
    z[2], t[2] = z[2] * 0 + 1e4, t[2] * 0 - 1e4  # all alike, and far from the other model's
    t[3] = z[3] + 1e-2
    found = both(DistillationLoss(divergence, cross_entropy=0.1), z, t, labels=torch.zeros(4, dtype=torch.long))
    agree(found, smallest=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_minus_infinity(divergence: Any) -> None:
    """Impossible to both: nothing. A row of nothing else has no distribution, and says so."""
    z, t = normal(4, 400, seed=1), normal(4, 400, seed=2)
    z[:, :150], t[:, :150] = -torch.inf, -torch.inf  # the first tile has nothing else
    z[1, 151:], t[1, 151:] = -torch.inf, -torch.inf  # one token is left
    settings = DistillationLoss(divergence)
    agree(both(settings, z, t), smallest=1e-8)
    z[2] = -torch.inf
    for gradient, values in both(settings, z, t):
        assert not bool(values[0, 2].isfinite()) and not bool(gradient[2].isfinite().any())
        assert bool(values[0, [0, 1, 3]].isfinite().all()) and bool(gradient[[0, 1, 3]].isfinite().all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_only_one_model_holds_possible(divergence: Any) -> None:
    """The divergence that is infinite then is infinite in both; the others are finite."""
    z, t = normal(2, 200, seed=1), normal(2, 200, seed=2)
    z[0, 7], t[1, 9] = -torch.inf, -torch.inf
    (want, want_values), (got, got_values) = both(DistillationLoss(divergence), z, t)
    torch.testing.assert_close(got_values, want_values, rtol=1e-5, atol=1e-6)
    infinite = {"forward_kl": [True, False], "reverse_kl": [False, True], "jsd": [False, False]}
    assert got_values[0].isinf().tolist() == infinite[divergence]
    finite = want.isfinite().all(-1)
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-7)


def test_numbers_that_are_none_are_not_hidden() -> None:
    for divergence in DIVERGENCES:
        z, t = normal(2, 200, seed=1), normal(2, 200, seed=2)
        z[0, 150] = torch.nan
        for gradient, values in both(DistillationLoss(divergence), z, t):
            assert bool(values[0, 0].isnan()) and bool(gradient[0].isnan().all()) and bool(gradient[1].isfinite().all())


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "sampled"])
def test_masked_rows(divergence: Any) -> None:
    z, t = normal(5, 300, seed=1), normal(5, 300, seed=2)
    z[1], t[3] = torch.nan, torch.inf
    theirs: Tensor | SampledTargets = t
    if divergence == "sampled":
        theirs = drawn(5, 300, 6)
    settings = DistillationLoss("forward_kl" if divergence == "sampled" else divergence, cross_entropy=0.3)
    valid = torch.tensor([True, False, True, False, True])
    found = both(settings, z, theirs, labels=torch.arange(5), valid=valid)
    agree(found)
    for gradient, values in found:
        assert bool((gradient[~valid] == 0).all()) and bool((values[:, ~valid] == 0).all())


def drawn(rows: int, vocabulary: int, draws: int) -> SampledTargets:
    q = normal(rows, vocabulary, seed=4).softmax(-1)
    return sampled_targets(q, torch.rand(rows, generator=torch.Generator().manual_seed(5)), draws).to(
        torch.device(DEVICE)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draws", [1, 5, 12])
def test_sampled_targets(draws: int, dtype: torch.dtype) -> None:
    weight = torch.empty(300, 0, device=DEVICE)
    for softcap, temperature, cross_entropy in itertools.product([None, 5.0], [1.0, 2.0], [0.0, 0.3]):
        settings = DistillationLoss(temperature=temperature, weight=0.7, cross_entropy=cross_entropy)
        head = Head(weight, None, 1.5, softcap)
        theirs = drawn(4, 300, draws)
        labels = theirs.ids_TN[:, 0].clone()  # a label that was drawn, too
        found = both(settings, normal(4, 300, seed=1), theirs, heads=(head, head), labels=labels, dtype=dtype)
        agree(found, tolerance=1e-5 if dtype == torch.float32 else BF16_TOLERANCE)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_loss_in_fp32(divergence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "fuses", lambda device: True)
    for apart in (1.0, 1e-2):
        inputs = Inputs(bias=True, scale=0.7, softcap=5.0, tokens=11)
        if apart < 1.0:  # near convergence the differences count
            inputs.teacher_hidden, inputs.teacher_weight = inputs.hidden, inputs.weight
            inputs.hidden = inputs.hidden + apart * torch.randn(inputs.hidden.shape, dtype=torch.float64)
        settings = DistillationLoss(divergence, 2.0, 0.7, 0.3 if apart == 1.0 else 0.0, chunk_tokens=4)
        want_loss, want = inputs.exact(settings)
        loss, got = inputs.chunked(settings)
        assert error(got, want) < 1e-5
        assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_loss_in_bf16_has_the_gradient_to_half_a_percent(
    divergence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of bf16 with fp32 results, gradients of the logits in bf16, four chunks to a product, a last one that is
    not full; near convergence."""
    emulate_tensor_cores(monkeypatch)
    monkeypatch.setattr(distillation, "fuses", lambda device: True)
    inputs = Inputs()
    inputs.teacher_hidden, inputs.teacher_weight = inputs.hidden, inputs.weight
    inputs.hidden = inputs.hidden + 0.05 * torch.randn(inputs.hidden.shape, dtype=torch.float64)
    rounded(inputs)
    monkeypatch.setattr("minitron.specs.loss_chunks.GRADIENT_BYTES", 4 * 4 * 500 * 2)
    settings = DistillationLoss(divergence, chunk_tokens=4)
    _, want = inputs.exact(settings)
    sums = torch.zeros(inputs.weight.shape)

    def into(*given: Any) -> Tensor:
        return terms(settings, *given, head_gradient_VD=sums).total

    leaves = [inputs.hidden.bfloat16().requires_grad_(), inputs.weight.bfloat16().requires_grad_()]
    teacher = Head(inputs.teacher_weight.bfloat16(), None, 0.5)
    into(leaves[0], Head(leaves[1]), inputs.teacher_hidden.bfloat16(), teacher, inputs.labels).backward()
    assert leaves[0].grad is not None and leaves[1].grad is None
    assert error([leaves[0].grad, sums], want) < 0.005


def test_no_tokens_give_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "fuses", lambda device: True)
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    result = distillation_loss(
        DistillationLoss(), hidden, Head(weight), torch.zeros(0, 4), Head(torch.randn(9, 4)), None, normaliser=1.0
    )
    result.total.backward()
    assert float(result.total.detach()) == 0.0 and weight.grad is not None and float(weight.grad.abs().max()) == 0.0
