"""The adapter that gives lm-evaluation-harness a loaded model and this process's share of the requests."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM

from minitron.runtime.models import LanguageModel, Tokenizer
from minitron.runtime.world import World

_POSITIONS = 2048
"""The context length of a model whose configuration states none."""


class Harness(HFLM):  # type: ignore[misc]
    """The harness's own model class around a model that is already loaded.

    Several processes share the requests: each has the whole model and every n-th document of n processes, as with the
    harness's own data parallelism, and the first process gets all scores. Where a tokenizer lacks a special token that
    the harness needs, an existing token of the vocabulary is used: a newly added one would have no embedding.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, world: World, batch_size: int) -> None:
        tokenizer = with_padding(tokenizer)
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            pretrained=model.module,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=model.positions or _POSITIONS,
            prefix_token_id=tokenizer.pad_token_id if prefix is None else prefix,
        )
        self._world = world
        self._rank, self._world_size = world.rank, world.size

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str | None:
        """Decodes tokens as the harness does; returns None for no tokens, because the harness asks for that where no
        token ends a text.
        """
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Computes log-likelihoods without the harness's progress bar: progress is shown by us."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Computes rolling log-likelihoods without the harness's progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Generates answers without the harness's progress bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gathers one number of each process, [ranks]."""
        everyone: list[Any] = [None] * self._world_size
        dist.all_gather_object(everyone, tensor.item(), group=self._world.waiting)
        return torch.tensor(everyone)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gathers the objects of all processes at the process `dst`."""
        everyone: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, everyone, dst=dst, group=self._world.waiting)
        return everyone

    def barrier(self) -> None:
        """Waits until all processes have called this method."""
        self._world.wait()


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a tokenizer that can pad: the given one, or a copy that pads with its EOS, its BOS, or else its first
    token. Padding is masked, so the choice of the token does not matter.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    borrowed = next((one for one in (tokenizer.eos_token_id, tokenizer.bos_token_id) if one is not None), 0)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(borrowed)
    return tokenizer
