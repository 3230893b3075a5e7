"""The token ids that routes are compared on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.specs.model_config import positions_of

ROWS, LENGTH = 2, 48
# Tokens beyond a window, so that some see less than all before them.
BEYOND = 16
# The longest sequences that are compared: logits of both routes are held, and every check is a run or two.
LONGEST = 1024
# Keys that say how many tokens back a layer looks, or how many it takes at a time, by the ends of their names.
WINDOWS = ("window", "window_size", "chunk_size")


def token_ids(teacher: AnalysedTeacher, samples: torch.Tensor | None) -> torch.Tensor:
    """Ids [2, S], longer than the shortest window where that is possible: calibration data, else random ones."""
    config, length = teacher.captured.config, teacher.captured.length
    if length is None:
        beyond = next((one + BEYOND for one in windows(config)), LENGTH)
        length = max(LENGTH, beyond) if beyond <= LONGEST else LENGTH
        length = min(length, positions_of(config) or length)
    if samples is not None and samples.numel() >= ROWS * length:
        if samples.shape[1] >= length and samples.shape[0] >= ROWS:
            return samples[:ROWS, :length].contiguous()
        return samples.reshape(-1)[: ROWS * length].reshape(ROWS, length).contiguous()
    return torch.randint(0, config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))


def windows(config: Any) -> list[int]:
    """The windows of a configuration and of its parts, the shortest first."""
    return sorted({*_windows(config)})


def _windows(config: Any) -> Iterator[int]:
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _windows(value)
        elif key.endswith(WINDOWS) and type(value) is int and value > 0:
            yield value
