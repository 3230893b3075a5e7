"""The block `evaluate`: the measurements of the result's quality."""

from __future__ import annotations

from pydantic import Field

from minitron.specs.blocks.base import Block, Count, NonNegativeFloat, PositiveInt, Text
from minitron.specs.blocks.benchmarks import Suite
from minitron.specs.blocks.requirements import BoundText
from minitron.specs.data import HeldOutSource


class Published(Block):
    """Scores that others have published for the same student, shown next to the measured scores."""

    source: Text
    """The place where the scores are published."""

    scores: dict[str, NonNegativeFloat]
    """Task -> score, as a fraction: 0.695."""


class Evaluate(Block):
    """The measurements on teacher, pruned student and distilled student."""

    suite: Suite = ()
    """`minitron-9`: the nine benchmarks of the published tables with their shots and metrics; or a list of lm-eval's tasks,
    each a name or `{task: hellaswag, shots: 10, metric: acc_norm}`."""

    data_dir: Text | None = None
    """A folder, relative to this file, with local copies of the tasks' data instead of the Hub: `TASK.jsonl` for each task
    of `suite`, and where its examples come from another split `TASK.train.jsonl`."""

    require: dict[str, BoundText] = Field(default_factory=dict)
    """Bounds that the result must reach, else `eval` and `run` end with exit code 1: `held_out_loss`, `recovered` or a task of
    `suite` -> `"<= 1.05x teacher"`, `">= 0.95x teacher"`, `">= 0.6"`."""

    published: Published | None = None
    """Scores that others have published for the same student."""

    held_out: HeldOutSource | None = None
    """Text that is never trained on, for loss and perplexity; `{fraction: 1%}` takes it from `distill.data`."""

    max_tokens: Count = 200_000
    """At most this many tokens of `held_out` are read."""

    every_tokens: Count | None = None
    """During training, `held_out` is measured each time that this many tokens were trained on. Left out: at
    checkpoints, no more often than that two held-out tokens are read for each one that is trained on."""

    prompt: Text | None = None
    """A text that each of the three models continues, to be read by people. Left out: the beginning of `held_out`."""

    continuation_tokens: PositiveInt = 64
    """Length of that continuation."""
