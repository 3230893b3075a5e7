"""Samples of the teacher instead of the teacher: right in expectation, exactly, and close at the rate that means have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron.runtime.loss import DistillationLoss, Head, SampledTargets, distillation_loss
from minitron.runtime.loss.sampled import count, draw
from tests.runtime import naive
from tests.runtime.test_distillation_loss import LargestTensor

T, V, D = 3, 17, 5


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets(q_TV: Tensor, uniform_T: Tensor, draws: int) -> SampledTargets:
    """Through the form that is stored: ids, counts and how many there are."""
    ids, counts, unique_T = count(draw(q_TV, uniform_T, draws))
    place = torch.arange(draws) < unique_T.unsqueeze(-1)
    ids_TN, weights_TN = torch.zeros(len(q_TV), draws, dtype=torch.long), torch.zeros(len(q_TV), draws)
    ids_TN[place], weights_TN[place] = ids, counts / draws
    entropy = -(q_TV * q_TV.log().clamp_min(-1e30)).sum()
    return SampledTargets(ids_TN, weights_TN, float(entropy))


def expectation(q_V: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the weights over all uniform numbers, by enumeration: between the places where a point
    passes from one token to the next, nothing changes."""
    edges = torch.cat([(q_V.cumsum(0) / q_V.sum() * draws) % 1.0, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    edges = edges.sort().values
    lengths, middles = edges.diff(), (edges[1:] + edges[:-1]) / 2
    ids_RN = draw(q_V.expand(len(middles), -1), middles, draws)
    weights_RV = torch.zeros(len(middles), len(q_V), dtype=torch.float64)
    weights_RV.scatter_add_(1, ids_RN, torch.full(ids_RN.shape, 1.0 / draws, dtype=torch.float64))
    mean_V = lengths @ weights_RV
    return mean_V, lengths @ (weights_RV - mean_V).square()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9).filter(lambda q: sum(q) > 1e-3),
    st.integers(1, 12),
)
def test_weights_have_the_teachers_probabilities_as_their_expectation(q: list[float], draws: int) -> None:
    q_V = torch.tensor(q, dtype=torch.float64)
    q_V /= q_V.sum()
    mean_V, variance_V = expectation(q_V, draws)
    torch.testing.assert_close(mean_V, q_V, rtol=0.0, atol=1e-12)
    # Never more than independent draws vary.
    assert bool((variance_V <= q_V * (1 - q_V) / draws + 1e-12).all())


def test_what_cannot_come_is_never_drawn() -> None:
    q_RV = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    for uniform in (0.0, 0.3, 1.0 - 2**-53):
        ids = draw(q_RV, torch.full((2,), uniform, dtype=torch.float64), 4)
        assert set(ids[0].tolist()) == {1, 3} and ids[1].tolist() == [0, 0, 0, 0]


def test_small_probabilities_in_a_large_vocabulary_are_not_rounded_away() -> None:
    """In fp32 a sum near 1 does not move by 1e-8."""
    q_RV = torch.full((1, 1 << 17), 1e-8)
    q_RV[0, 0] = 1.0 - 1e-8 * ((1 << 17) - 1)
    late = draw(q_RV, torch.tensor([1.0 - 1e-6]), 1)
    assert int(late) == pytest.approx((1 << 17) - 100, abs=3)


def test_draws_are_counted() -> None:
    ids, counts, unique = count(torch.tensor([[2, 2, 5], [2, 3, 4], [7, 7, 7]]))
    assert ids.tolist() == [2, 5, 2, 3, 4, 7] and counts.tolist() == [2, 1, 1, 1, 1, 3] and unique.tolist() == [2, 3, 1]
    empty = count(torch.zeros(0, 3, dtype=torch.long))
    assert [len(part) for part in empty] == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradient_are_those_of_the_formula(temperature: float, softcap: float | None) -> None:
    loss = DistillationLoss(temperature=temperature, weight=0.7, cross_entropy=0.3, chunk_tokens=2)
    hidden, weight = random(T, D, seed=1).requires_grad_(), random(V, D, seed=2).requires_grad_()
    head, labels = Head(weight, None, 1.5, softcap), torch.tensor([1, 4, 9])
    q_TV = random(T, V, seed=3).softmax(-1)
    drawn = targets(q_TV, random(T, seed=4).sigmoid(), 6)
    terms = distillation_loss(loss, hidden, head, None, None, labels, normaliser=5.0, targets=drawn)
    logits = naive.logits(hidden.double(), replace(head, weight_VD=weight.double()))
    dense_TV = torch.zeros(T, V, dtype=torch.float64).scatter_add_(1, drawn.ids_TN, drawn.weights_TN.double())
    crossed = -(dense_TV * (logits / temperature).log_softmax(-1)).sum()
    likelihood = -logits.log_softmax(-1).gather(-1, labels[:, None]).sum()
    wanted = (0.7 * temperature**2 * (crossed - drawn.entropy) + 0.3 * likelihood) / 5.0
    torch.testing.assert_close(terms.total.double(), wanted, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(wanted, [hidden, weight])
    for got, gradient in zip(torch.autograd.grad(terms.total, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


def gradient_and_value(drawn: SampledTargets | None) -> tuple[Tensor, float]:
    """Of the head, with samples or with the teacher itself."""
    hidden, weight = random(T, D, seed=1), random(V, D, seed=2).requires_grad_()
    theirs, their_head = random(T, D, seed=5), Head(random(V, D, seed=6, scale=1.5))
    terms = distillation_loss(
        DistillationLoss(), hidden, Head(weight), None if drawn else theirs, None if drawn else their_head, None,
        normaliser=T, targets=drawn,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.total, [weight])
    return gradient, float(terms.divergence)


def test_the_mean_over_captures_approaches_the_online_loss_as_means_do() -> None:
    """The error of the mean of n captures falls with the root of n, in gradient and value: no bias is left over."""
    true_gradient, true_value = gradient_and_value(None)
    q_TV = naive.logits(random(T, D, seed=5).double(), Head(random(V, D, seed=6, scale=1.5).double())).softmax(-1)
    uniforms = torch.rand(1600, T, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = [gradient_and_value(targets(q_TV, uniform_T, 2)) for uniform_T in uniforms]
    gradients = torch.stack([gradient for gradient, _ in found]) - true_gradient
    values = torch.tensor([value for _, value in found]) - true_value

    def error(errors: Tensor, n: int) -> float:
        """Root mean square of the error of means of n."""
        means = errors.flatten(1).split(n)
        return float(torch.stack([mean.mean(0).square().mean() for mean in means]).mean().sqrt())

    for errors in (gradients, values.unsqueeze(-1)):
        one = error(errors, 1)
        assert error(errors, 16) == pytest.approx(one / 4, rel=0.25)
        assert error(errors, 100) == pytest.approx(one / 10, rel=0.45)


def test_no_tensor_of_tokens_times_vocabulary_ever_exists() -> None:
    tokens, vocabulary = 512, 4096
    hidden, weight = random(tokens, 8, seed=1).requires_grad_(), random(vocabulary, 8, seed=2).requires_grad_()
    drawn = targets(torch.full((tokens, vocabulary), 1.0 / vocabulary), torch.rand(tokens), 12)
    loss = DistillationLoss(chunk_tokens=32)
    with LargestTensor() as seen:
        distillation_loss(loss, hidden, Head(weight), None, None, None, normaliser=1.0, targets=drawn)
    assert 32 * vocabulary <= seen.elements < 64 * vocabulary
