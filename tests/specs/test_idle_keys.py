"""A key that changes nothing beside the others is said, with its place; the same key is silent where it decides something."""

from __future__ import annotations

import pytest

from minitron.specs.errors import located
from minitron.specs.idle_keys import RULES, idle_keys
from tests.specs.conftest import Load
from tests.specs.specimens import SHORTEST, SMALL

TRAINED = SMALL.replace("tokens: 1B}", "tokens: 1B, {}}")
LOSS = TRAINED.replace("{}", "loss: {cross_entropy: 1, logits: {weight: 0, {}}}")
SCORED = SMALL.replace("[a.txt]}}", "[a.txt]}, {}}", 1)
JUDGED = SMALL + "evaluate: {held_out: {text: [b.txt]}, {}}\n"
BUDGET = SMALL + "search: {budget: {memory: 1GiB, {}}}\nevaluate: {held_out: {text: [b.txt]}}\n"
CORRECTED = SMALL + "teacher_correction: {tokens: 1B, optimizer: {{}}}\n"
# What is written, the spec in which it changes nothing, and one in which it does.
CASES = {
    "teacher.compute": (
        "compute: float8",
        "teacher: {model: a/b, {}}\nstudent: {layers: {drop: [2]}}\n",
        SMALL.replace("org/teacher}", "org/teacher, {}}"),
    ),
    "student.multiple_of": ("multiple_of: 16", SMALL.replace("48}", "48, {}}"), SMALL.replace("48}", '"50%", {}}')),
    "importance.width": ("width: {batch: mean}", SHORTEST + "importance: {{}}\n", SCORED),
    "importance.depth": ("depth: {contiguous: true}", SCORED, SCORED.replace("48}", "48, num_hidden_layers: 4}")),
    "recovery.refit": ("refit: least_squares", SHORTEST + "recovery: {{}}\n", SMALL + "recovery: {{}}\n"),
    "search.budget.tolerance": ("tolerance: 1%", BUDGET, BUDGET.replace("memory: 1GiB", "parameters: 1B")),
    "teacher_correction.optimizer.momentum": (
        "momentum: 0.8",
        CORRECTED,
        CORRECTED.replace("{{}}", "{name: muon, {}}"),
    ),
    "distill.optimizer.momentum": (
        "optimizer: {momentum: 0.8}",
        TRAINED,
        TRAINED.replace("{}", "optimizer: {name: muon, momentum: 0.8}"),
    ),
    "distill.loss.logits.divergence": ("divergence: jsd", LOSS, LOSS.replace("weight: 0, ", "")),
    "distill.loss.logits.temperature": ("temperature: 2", LOSS, LOSS.replace("weight: 0, ", "")),
    "distill.loss.hidden_states": (
        "hidden_states: {weight: 0}",
        TRAINED.replace("{}", "loss: {{}}"),
        TRAINED.replace("{}", "loss: {hidden_states: {weight: 1}}"),
    ),
    "distill.layout.teacher": (
        "layout: {teacher: sharded}",
        TRAINED.replace("{}", "loss: {cross_entropy: 1, logits: {weight: 0}}, {}"),
        TRAINED,
    ),
    "evaluate.data_dir": ("data_dir: here", JUDGED, JUDGED.replace("{}", "suite: [hellaswag], {}")),
    "evaluate.published": (
        "published: {source: x, scores: {hellaswag: 0.5}}",
        JUDGED,
        JUDGED.replace("{}", "suite: [hellaswag], {}"),
    ),
    "evaluate.continuation_tokens": (
        "continuation_tokens: 8",
        SMALL + "evaluate: {suite: [hellaswag], {}}\n",
        SMALL + "evaluate: {prompt: Once, {}}\n",
    ),
    "evaluate.max_tokens": ("max_tokens: 9", SMALL + "evaluate: {prompt: Once, {}}\n", JUDGED),
    "evaluate.every_tokens": ("every_tokens: 1M", SMALL + "evaluate: {prompt: Once, {}}\n", JUDGED),
}


def written(text: str, key: str) -> str:
    return text.replace("{}", key)


def test_every_rule_is_tried() -> None:
    assert list(CASES) == [rule.path for rule in RULES]


@pytest.mark.parametrize("path", CASES)
def test_it_is_said_where_it_changes_nothing(load: Load, path: str) -> None:
    key, idle, busy = CASES[path]
    loaded = load(written(idle, key))
    (error,) = located(idle_keys(loaded), loaded)
    assert error.path == path and error.line >= 1 and error.message.startswith("changes nothing here: ")
    assert error.hint == "leave it out"
    assert list(idle_keys(load(written(busy, key)))) == []


@pytest.mark.parametrize(
    ("key", "text"),
    [
        # The beginning of the held-out text is continued where there is no prompt.
        ("continuation_tokens: 8", JUDGED),
        # `minitron capture` shards the teacher too.
        ("layout: {teacher: sharded}", TRAINED.replace("{}", "teacher_logits: {sampled: 4}, {}")),
        # A range without a step is walked through in multiples.
        ("multiple_of: 16", BUDGET.replace(", {}}}", "}}").replace("48}", "{min: 16, max: 48}, {}}")),
    ],
)
def test_keys_that_decide_something_elsewhere_are_not_idle(load: Load, key: str, text: str) -> None:
    assert [one.path for one in idle_keys(load(written(text, key)))] == []


def test_a_default_that_is_written_out_is_no_mistake(load: Load) -> None:
    assert list(idle_keys(load(written(TRAINED, "optimizer: {momentum: 0.95}")))) == []
