"""Greedy generation, and its speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig

from minitron.runtime.models import LanguageModel

_REPETITIONS = 3


@contextmanager
def plain_generation(model: LanguageModel) -> Iterator[None]:
    """Makes generation use only the settings of the call. A model's own configuration may hold penalties, suppressed
    tokens and several answers at a time, and transformers takes from it every setting that a call leaves open.
    """
    module = model.module
    own = module.generation_config
    module.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        module.generation_config = own


@torch.no_grad()
def continue_greedily(
    model: LanguageModel, prompt: Sequence[int], tokens: int, *, to_the_end: bool = False
) -> list[int]:
    """Returns the most likely next tokens after `prompt`, one by one, until the model ends the text or there are
    `tokens`.

    `to_the_end`: the EOS token does not stop generation, so that there are exactly `tokens`. Where the model's context
    is too short for all of them, the beginning of the prompt is left out, and there may be fewer tokens.
    """
    module, room = model.module, model.positions
    if room is not None:
        prompt = prompt[-max(1, room - tokens) :]
        tokens = min(tokens, room - len(prompt))
    ids = torch.tensor([list(prompt)], device=next(module.parameters()).device)
    with plain_generation(model):
        output = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens if to_the_end else None,
            pad_token_id=0,
            use_cache=True,
        )
    return [int(token) for token in output[0, len(prompt) :]]


def tokens_per_second(model: LanguageModel, prompt: Sequence[int], tokens: int) -> float:
    """Measures the speed of greedy decoding with a key-value cache, one sequence at a time, prompt included: the median
    of three runs.
    """
    rates = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        written = len(continue_greedily(model, prompt, tokens, to_the_end=True))  # a list: the device is done
        rates.append(written / (time.perf_counter() - start))
    return statistics.median(rates)
