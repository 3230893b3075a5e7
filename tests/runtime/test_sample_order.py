"""Which sample comes when is a function of the seed and the global sample index, and of nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.runtime.data import Corpus, Windows
from minitron.runtime.order import BLEND_BLOCK, blend_place, blend_quotas, permute, shuffled, shuffled_in_blocks
from minitron.specs.shards.growing import GrowingStream
from minitron.specs.shards.stream import INDEX, Largest, write_shard

BOS, EOS = 0, 1


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_permutation_takes_every_place_once(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_a_permutation_of_a_billion_costs_nothing() -> None:
    places = [permute(index, 10**9, key=3) for index in range(1000)]
    assert len(set(places)) == 1000 and max(places) > 9 * 10**8 and min(places) < 10**8


def test_neighbours_part_and_keys_differ() -> None:
    one, other = ([permute(index, 1000, key) for index in range(1000)] for key in (1, 2))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(one)) < 15


def test_every_epoch_has_every_sample_in_an_order_of_its_own() -> None:
    epochs = [[shuffled(epoch * 50 + index, 50, seed=0) for index in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [shuffled(index, 50, seed=1) for index in range(50)]


@given(size=st.integers(1, 200), block=st.integers(1, 70), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_blocks_are_shuffled_one_after_the_other(size: int, block: int, seed: int) -> None:
    """The first pass takes every sample once, each block of it before the next, whatever is known of what follows."""
    whole = [shuffled_in_blocks(index, size, block, seed) for index in range(3 * size)]
    for start in range(0, size, block):
        end = min(start + block, size)
        assert sorted(whole[start:end]) == list(range(start, end))
        if end - start == block:
            assert whole[start:end] == [shuffled_in_blocks(index, end, block, seed) for index in range(start, end)]
    assert whole[size:] == [shuffled(index, size, seed) for index in range(size, 3 * size)]


def test_a_corpus_is_ready_block_by_block(tmp_path: Path) -> None:
    """10 tokens a shard, sequences of 4 in blocks of 3 (12 tokens and the one that is predicted last)."""
    folder = tmp_path / "stream"
    growing = GrowingStream(folder)
    corpus = Corpus((Windows(growing.tokens, 4, None, growing.learnt, growing=growing),), (1,), 5, block=3)
    about = {"pieces": 1, "documents": 1, "refused": [], "largest": Largest(9, "here")}
    ready = []
    for number in range(3):
        write_shard(folder, number, np.arange(10 * number, 10 * number + 10, dtype=np.uint16), None, **about)
        growing.poll()
        ready.append([corpus.ready([sample]) for sample in (0, 2, 3, 5, 6, 99)])
    assert ready[0] == [False] * 6
    assert ready[1] == [True, True, False, False, False, False]
    assert ready[2] == [True, True, True, True, False, False]
    before = corpus.batch(range(6))
    (folder / INDEX).write_text('{"shards": 3}')
    growing.poll()
    assert corpus.ready(range(99)) and len(corpus.sources[0]) == 8
    whole = Corpus((Windows(np.arange(30, dtype=np.uint16), 4, None),), (1,), 5, block=3)
    assert torch.equal(before.input_ids_BL, whole.batch(range(6)).input_ids_BL)
    assert torch.equal(corpus.batch(range(40)).labels_BL, whole.batch(range(40)).labels_BL)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
@settings(deadline=None)
def test_quotas_are_the_weights_to_one_part_in_a_block(weights: list[float]) -> None:
    quotas = blend_quotas(weights)
    assert sum(quotas) == BLEND_BLOCK and min(quotas) >= 1
    for quota, weight in zip(quotas, weights, strict=True):
        assert quota / BLEND_BLOCK == pytest.approx(weight / sum(weights), abs=len(weights) / BLEND_BLOCK)


def test_a_blend_holds_its_shares_and_takes_each_source_in_turn() -> None:
    quotas = blend_quotas([0.7, 0.2, 0.1])
    places = [blend_place(index, quotas, seed=0) for index in range(2 * BLEND_BLOCK)]
    assert Counter(source for source, _ in places) == {0: 14_000, 1: 4_000, 2: 2_000}
    for source in range(3):
        assert sorted(number for s, number in places if s == source) == list(range(2 * quotas[source]))
    # already in a short stretch, and not in runs
    assert Counter(source for source, _ in places[:1000])[0] == pytest.approx(700, abs=60)


def stream(length: int, bos: int | None = None) -> np.ndarray:
    """Tokens 10, 11, ...; with BOS before the first and the ninth."""
    tokens = np.arange(10, 10 + length, dtype=np.uint16)
    if bos is not None:
        tokens[[0, 9]] = bos
    return tokens


@given(length=st.integers(2, 60), window=st.integers(2, 16))
@settings(deadline=None)
def test_without_bos_every_token_but_the_first_is_predicted_once_from_its_predecessor(length: int, window: int) -> None:
    windows = Windows(stream(length), window, bos=None)
    batch = windows.batch(range(len(windows)))
    assert batch.labels_BL[batch.valid_BL].tolist() == list(range(11, 10 + length))
    assert (batch.input_ids_BL[batch.valid_BL] + 1 == batch.labels_BL[batch.valid_BL]).all()


@given(length=st.integers(10, 60), window=st.integers(2, 16))
@settings(deadline=None)
def test_with_bos_every_window_begins_with_it_and_every_other_token_is_predicted_once(length: int, window: int) -> None:
    windows = Windows(stream(length, BOS), window, bos=BOS)
    batch = windows.batch(range(len(windows)))
    rows = batch.valid_BL.any(1)  # a window may hold nothing but a BOS
    assert (batch.input_ids_BL[rows, 0] == BOS).all()
    assert not (batch.input_ids_BL[rows, 1] == BOS)[batch.valid_BL[rows, 1]].any(), "no window begins with two"
    predicted = batch.labels_BL[batch.valid_BL].tolist()
    assert predicted == [token for token in stream(length, BOS).tolist() if token != BOS]


def test_the_end_of_a_stream_is_padded_and_masked() -> None:
    batch = Windows(stream(7), 4, bos=None).batch([1])
    assert batch.labels_BL.tolist() == [[15, 16, 0, 0]] and batch.valid_BL.tolist() == [[True, True, False, False]]


def test_ranks_share_a_global_batch_without_changing_it() -> None:
    corpus = Corpus((Windows(stream(200), 4, None), Windows(stream(90), 4, None)), tuple(blend_quotas([1, 3])), seed=5)
    whole = corpus.batch(range(40, 48))
    parts = [corpus.batch(range(40 + 2 * rank, 42 + 2 * rank)) for rank in range(4)]
    assert whole.input_ids_BL.tolist() == [row for part in parts for row in part.input_ids_BL.tolist()]


def test_micro_batches_cut_a_batch() -> None:
    batch = Windows(stream(100), 4, None).batch(range(6))
    assert [micro.input_ids_BL.shape[0] for micro in batch.micro_batches(4)] == [4, 2]
