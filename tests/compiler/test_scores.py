"""Importance scores against their formulas, written out in numpy in double precision."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.compiler.importance.row_blocks import row_blocks
from minitron.compiler.importance.scores import Accumulator, Aggregation, ScoreTable, WidthConfig, over_tokens

HOW: tuple[Aggregation, ...] = ("l2", "mean", "var")
SAMPLES = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1, 3.0])


def plain(how: Aggregation, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """An aggregation over the first axis."""
    if how == "l2":
        return np.sqrt((values**2).sum(0))
    mean = values.sum(0) / len(values)
    return mean if how == "mean" else ((values - mean) ** 2).sum(0) / len(values)


def formula(config: WidthConfig, samples: torch.Tensor) -> npt.NDArray[np.float64]:
    """|a| over the tokens of every sample, then over the samples."""
    magnitudes = np.abs(samples.double().numpy())
    return plain(config.batch, np.stack([plain(config.sequence, sample) for sample in magnitudes]))


def accumulated(config: WidthConfig, batches: list[torch.Tensor]) -> npt.NDArray[np.float64]:
    accumulator = Accumulator(config)
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result().double().numpy()


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(HOW, HOW)))
def test_every_aggregation_is_its_formula(batch: Aggregation, sequence: Aggregation) -> None:
    config = WidthConfig(batch, sequence)
    assert np.allclose(accumulated(config, [SAMPLES]), formula(config, SAMPLES), rtol=1e-4, atol=1e-6)


def test_the_default_is_that_of_the_reference() -> None:
    """sqrt(sum over samples of (mean over tokens of |a|)^2): of two samples with means 3 and 4 it is 5."""
    samples = torch.tensor([[[2.0], [-4.0]], [[4.0], [4.0]]])
    assert accumulated(WidthConfig(), [samples]).tolist() == [5.0]


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(HOW, HOW)))
@settings(deadline=None, max_examples=20)
@given(cuts=st.sets(st.integers(1, 6)))
def test_how_samples_come_in_batches_does_not_matter(batch: Aggregation, sequence: Aggregation, cuts: set[int]) -> None:
    bounds = [0, *sorted(cuts), len(SAMPLES)]
    batches = [SAMPLES[a:b] for a, b in itertools.pairwise(bounds)]
    config = WidthConfig(batch, sequence)
    assert np.allclose(accumulated(config, batches), accumulated(config, [SAMPLES]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", HOW)
def test_the_order_of_samples_does_not_matter(batch: Aggregation) -> None:
    config = WidthConfig(batch)
    assert np.allclose(accumulated(config, [SAMPLES.flip(0)]), accumulated(config, [SAMPLES]), rtol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_the_sign_of_an_activation_does_not_matter(how: Aggregation) -> None:
    config = WidthConfig(how, how)
    assert accumulated(config, [-SAMPLES]).tolist() == accumulated(config, [SAMPLES]).tolist()


def test_low_precision_is_summed_in_fp32() -> None:
    """The mean of 1 and 1 + 2^-7, neighbours in bf16, lies between them."""
    value = torch.tensor([[[1.0], [1 + 2**-7]]], dtype=torch.bfloat16)
    assert accumulated(WidthConfig("mean", "mean"), [value]).tolist() == [1 + 2**-8]
    assert over_tokens(value.float(), "l2").item() == pytest.approx((1 + (1 + 2**-7) ** 2) ** 0.5)


@pytest.mark.parametrize("how", HOW)
def test_a_long_sample_is_summed_in_blocks_that_do_not_show(how: Aggregation) -> None:
    value = torch.randn(2, 300, 2048, generator=torch.Generator().manual_seed(0))
    assert len(row_blocks(value[0])) > 1
    magnitude = value.double().abs()
    whole = {"l2": magnitude.norm(dim=1), "mean": magnitude.mean(1), "var": magnitude.var(1, correction=0)}[how]
    torch.testing.assert_close(over_tokens(value, how).double(), whole, rtol=1e-6, atol=1e-7)
    assert over_tokens(value[1:], how).equal(over_tokens(value, how)[1:])  # whatever else is in the batch


def test_a_channel_that_never_varies_has_no_negative_variance() -> None:
    """A difference of rounded squares is below zero for one channel in a few."""
    channels = torch.linspace(0.01, 10, 301).expand(9, 3, 301)
    found = accumulated(WidthConfig("var", "mean"), [channels] * 5)
    assert (found >= 0).all() and (found < 1e-4).all()


def test_one_token_and_one_sample() -> None:
    one = torch.tensor([[[3.0, -4.0]]])
    assert accumulated(WidthConfig("l2", "l2"), [one]).tolist() == [3.0, 4.0]
    assert accumulated(WidthConfig("var", "var"), [one]).tolist() == [0.0, 0.0]


def test_a_score_of_nothing_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="no sample was seen"):
        Accumulator(WidthConfig()).result()


def test_a_table_comes_back_from_tensors_as_it_was() -> None:
    table = ScoreTable(
        hidden=np.arange(4, dtype=np.float32),
        heads={0: np.ones((2, 2), dtype=np.float32), 11: np.zeros((2, 2), dtype=np.float32)},
        widths={
            "intermediate_size": {0: np.arange(3, dtype=np.float32), 11: np.arange(3, dtype=np.float32)},
            "moe_intermediate_size": {1: np.arange(2, dtype=np.float32)},
        },
        layers=np.arange(12, dtype=np.float32),
    )
    tensors = table.to_tensors()
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads.11", "moe_intermediate_size.1"} <= set(tensors)
    again = ScoreTable.from_tensors(tensors).to_tensors()
    assert {name: value.tolist() for name, value in again.items()} == {n: v.tolist() for n, v in tensors.items()}


def test_an_empty_table_is_no_tensors() -> None:
    assert ScoreTable().to_tensors() == {}
    assert ScoreTable.from_tensors({}) == ScoreTable()
