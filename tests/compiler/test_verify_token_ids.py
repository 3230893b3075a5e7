"""The token ids that routes are compared on: calibration data where there is any, longer than the shortest window."""

from __future__ import annotations

import torch

from minitron.compiler.verify.token_ids import LONGEST, token_ids, windows
from tests.foundry import Foundry
from tests.models import tiny_config


def test_they_are_of_the_calibration_data_and_without_it_any(foundry: Foundry) -> None:
    teacher = foundry.whole("llama", num_hidden_layers=2).teacher
    samples = torch.arange(4 * 60).reshape(4, 60)
    assert torch.equal(token_ids(teacher, samples), samples[:2, :48])
    short = torch.arange(12 * 20).reshape(12, 20)
    assert torch.equal(token_ids(teacher, short), torch.arange(96).reshape(2, 48)), "several samples make a row"
    ids = token_ids(teacher, None)
    assert ids.shape == (2, 48) and torch.equal(ids, token_ids(teacher, short[:1])) and int(ids.max()) < 96


def test_they_are_longer_than_the_shortest_window_and_no_longer_than_the_model_reads(foundry: Foundry) -> None:
    def length(**changes: int) -> int:
        return token_ids(foundry.whole("mistral", num_hidden_layers=1, **changes).teacher, None).shape[1]

    assert length(sliding_window=8) == 48 and length(sliding_window=64) == 80
    assert length(sliding_window=120) == 128
    assert length(sliding_window=LONGEST) == 48, "such runs would take longer than the compile"


def test_windows_are_found_by_the_ends_of_their_keys() -> None:
    config = tiny_config("qwen2", sliding_window=24, max_window_layers=1)
    config.attention_chunk_size, config.sliding_window_pattern, config.use_sliding_window = 16, 3, True
    assert windows(config) == [16, 24]
