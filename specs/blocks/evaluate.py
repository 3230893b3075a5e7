"""`evaluate`: how good the result is."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Tag

from minitron.specs.blocks.base import LONGER, WORD, Block, Count, Listed, PositiveInt, Text, is_longer, word_or
from minitron.specs.data import DataSource

Suite: TypeAlias = Annotated[
    Annotated[Literal["minitron-9"], Tag(WORD)] | Annotated[Listed[Text], Tag(LONGER)],
    Discriminator(is_longer),
    word_or(
        "minitron-9 or a list of lm-eval tasks such as [hellaswag, arc_challenge]", "minitron-9", also=(list, tuple)
    ),
]


class Evaluate(Block):
    """What is measured of teacher, pruned student and distilled student."""

    suite: Suite = ()
    """`minitron-9`: the benchmarks of the published table but XL-Sum, which lm-eval does not have; or a list of its tasks."""

    data_dir: Text | None = None
    """A folder, relative to this file, with local copies of the tasks' data instead of the Hub: `TASK.jsonl` for each task
    of `suite`, and where its examples come from another split `TASK.train.jsonl`."""

    held_out: DataSource | None = None
    """Text that is never trained on, for loss and perplexity."""

    max_tokens: Count = 200_000
    """At most this many tokens of `held_out` are read."""

    every_tokens: Count | None = None
    """During training, `held_out` is measured each so many tokens. Left out: at every checkpoint."""

    prompt: Text | None = None
    """A text that each of the three models continues, to be read by people."""

    continuation_tokens: PositiveInt = 64
    """Length of that continuation."""
