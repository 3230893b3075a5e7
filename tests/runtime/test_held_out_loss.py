"""Held-out loss is the plain mean of -log p over the text, computed without all logits at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.runtime.data import Windows
from minitron.runtime.held_out import HeldOut, held_out
from minitron.runtime.loss import Head, likelihood, negative_log_likelihood
from minitron.runtime.models import LanguageModel
from minitron.runtime.world import World
from minitron.specs.errors import WorkError
from minitron.specs.training_plan import HeadPlan
from tests.runtime import tiny

ALONE = World(0, 1, torch.device("cpu"))
STREAM = np.random.default_rng(0).integers(2, 320, 50).astype(np.uint16)


def language_model(config: object, softcap: float | None = None) -> LanguageModel:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    return LanguageModel(module, HeadPlan.model_validate(tiny.HEAD | {"softcap": softcap}))


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_the_likelihood_is_cross_entropy(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_CHUNK_BYTES", 4 * 30 * 7)  # chunks of seven tokens
    hidden, head = torch.randn(tokens, 6), Head(torch.randn(30, 6), torch.randn(30), 0.5, 4.0)
    labels = torch.randint(0, 30, (tokens,))
    logits = 4 * torch.tanh(0.5 * (hidden @ head.weight_VD.T + head.bias_V) / 4)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert float(negative_log_likelihood(hidden, head, labels)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("config", "softcap"), [(tiny.llama(), None), (tiny.gemma2(), 3.0)])
def test_one_window_is_what_transformers_says(config: object, softcap: float | None) -> None:
    model = language_model(config, softcap)
    ids = torch.from_numpy(STREAM.astype(np.int64))[None]
    expected = model.module.eval()(input_ids=ids, labels=ids).loss.item()
    result = held_out(model, Windows(STREAM, 64, None), ALONE, batch_size=2)
    assert result.tokens == 49
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(expected), rel=1e-4)


def test_windows_are_scored_one_by_one() -> None:
    model = language_model(tiny.llama())
    total, count = 0.0, 0
    for start in range(0, 49, 16):
        ids = torch.from_numpy(STREAM[start : start + 17].astype(np.int64))[None]
        total += model.module.eval()(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    for batch_size in (1, 3):
        result = held_out(model, Windows(STREAM, 16, None), ALONE, batch_size=batch_size)
        assert result.tokens == count == 49 and result.loss == pytest.approx(total / count, rel=1e-5)


def test_a_window_with_bos_predicts_its_first_token_too() -> None:
    model = language_model(tiny.llama())
    ids = torch.cat([torch.tensor([0]), torch.from_numpy(STREAM[:16].astype(np.int64))])[None]
    expected = model.module.eval()(input_ids=ids, labels=ids).loss.item()
    result = held_out(model, Windows(STREAM[:16], 16, 0), ALONE, batch_size=1)
    assert result.tokens == 16 and result.loss == pytest.approx(expected, rel=1e-5)


def test_training_goes_on_in_training_mode() -> None:
    model = language_model(tiny.llama())
    model.module.train()
    held_out(model, Windows(STREAM, 16, None), ALONE, batch_size=1)
    assert model.module.training


def test_text_without_a_token_to_predict() -> None:
    nothing = Windows(np.zeros(4, np.uint16), 16, 0)  # BOS alone, which is never predicted
    with pytest.raises(WorkError, match="no token to predict; name more of it"):
        held_out(language_model(tiny.llama()), nothing, ALONE, batch_size=1)


def test_a_hopeless_model_has_no_overflow() -> None:
    assert HeldOut(loss=1000.0, tokens=1).perplexity == float("inf")


def test_a_teacher_predicts_what_it_was_made_for(tmp_path: Path) -> None:
    """The measure tells models apart: trained on a text, a model finds it likelier."""
    model = language_model(tiny.llama())
    windows = Windows(np.tile(np.arange(2, 18, dtype=np.uint16), 4), 16, None)
    before = held_out(model, windows, ALONE, batch_size=4).loss
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-2)
    batch = windows.batch(range(3))
    for _ in range(30):
        logits = model.module(input_ids=batch.input_ids_BL).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BL.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert held_out(model, windows, ALONE, batch_size=4).loss < 0.5 * before
