"""Calibration samples: documents become token sequences of one length, each beginning as the model was trained to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.specs.data import DataSource
from minitron.specs.errors import UsageError, WorkError
from tests.models import VOCABULARY, save_tokenizer, text

LINES = text(60).splitlines()
BEGIN, END = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    save_tokenizer(folder)
    (folder / "corpus.txt").write_text("\n".join(LINES))
    messages = [{"messages": [{"role": "user", "content": line}]} for line in LINES]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(one) for one in messages))
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def beginning(folder: Path) -> Any:
    """A tokenizer that puts the beginning-of-text token first, as those of Llama and Gemma do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer


def corpus(folder: Path) -> DataSource:
    return DataSource(text=(str(folder / "corpus.txt"),), document="line")


def stream(tokenizer: Any) -> list[int]:
    """All documents in order, each with its end."""
    return [token for line in LINES for token in [*tokenizer(line, add_special_tokens=False).input_ids, END]]


def samples(source: DataSource, tokenizer: Any, count: int, length: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return calibration_samples(source, tokenizer, vocabulary, SampleConfig(count, length))


def test_all_of_a_small_corpus_in_its_order(folder: Path, tokenizer: Any) -> None:
    ids, tokens = samples(corpus(folder), tokenizer, 1000, 32), stream(tokenizer)
    assert ids.dtype == torch.int64 and ids.shape == (len(tokens) // 32, 32)
    assert ids.flatten().tolist() == tokens[: ids.numel()]


def test_few_samples_come_from_all_over_a_larger_corpus(folder: Path, tokenizer: Any) -> None:
    """Every eighth sequence, where there are eight for each that is asked for."""
    every, few = samples(corpus(folder), tokenizer, 1000, 16), samples(corpus(folder), tokenizer, 5, 16)
    assert len(every) > 5 * 8 and torch.equal(few, every[: 5 * 8 : 8])
    few = samples(corpus(folder), tokenizer, 9, 32)
    every = samples(corpus(folder), tokenizer, 1000, 32)
    where = [every.tolist().index(row) for row in few.tolist()]
    assert where == sorted(where) and where[0] == 0 and where[-1] >= len(every) * 3 // 4


def test_each_sequence_begins_once_with_the_token_that_the_model_was_trained_to_see_first(
    folder: Path, beginning: Any
) -> None:
    """As in training, every document inside of it has that token too; no sequence begins with two."""
    ids = samples(corpus(folder), beginning, 1000, 32)
    assert (ids[:, 0] == BEGIN).all() and not (ids[:, 1] == BEGIN).any()
    whole = [token for line in LINES for token in [BEGIN, *beginning(line, add_special_tokens=False).input_ids, END]]
    place = 0
    for row in ids.tolist():
        start = place if whole[place] == BEGIN else place - 1
        assert row == [BEGIN, *whole[start + 1 : start + 32]]
        place = start + 32


def test_a_tokenizer_that_puts_nothing_first_gets_nothing_first(folder: Path, tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == 1 and not (samples(corpus(folder), tokenizer, 9, 32) == 1).any()


def test_chats_are_rendered_with_the_template(folder: Path, tokenizer: Any) -> None:
    source = DataSource(jsonl=(str(folder / "chat.jsonl"),), messages_field="messages")
    with pytest.raises(
        WorkError, match=r"chat\.jsonl:1: is a conversation and the tokenizer has no chat template; add"
    ):
        samples(source, tokenizer, 4, 32)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert torch.equal(samples(source, tokenizer, 9, 32), samples(corpus(folder), tokenizer, 9, 32))


def test_too_little_text(folder: Path, tokenizer: Any) -> None:
    words = "the calibration data has fewer than 100000 tokens; name more data, or a shorter sequence_length"
    with pytest.raises(WorkError, match=words):
        samples(corpus(folder), tokenizer, 4, 100_000)


def test_a_tokenizer_of_another_model(folder: Path, tokenizer: Any) -> None:
    largest = max(stream(tokenizer))
    words = rf"corpus\.txt:\d+ yields token {largest} \(`.+`\), and the teacher's vocabulary has {largest}; leave"
    with pytest.raises(UsageError, match=words):
        samples(corpus(folder), tokenizer, 1000, 32, vocabulary=largest)
    samples(corpus(folder), tokenizer, 1000, 32, vocabulary=largest + 1)


@pytest.mark.parametrize("broken", [False, True], ids=["none", "broken"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, broken: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if broken:
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"has no tokenizer that transformers can load \(.+\); copy its files there"):
        load_tokenizer(tmp_path)
