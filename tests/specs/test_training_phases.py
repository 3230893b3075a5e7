"""`distill.phases`: what phases take from the training, and what of them cannot be."""

from __future__ import annotations

import pytest

from .conftest import Errors, Load

PHASES = """\
teacher: {model: org/model}
student: {hidden_size: 64}
distill:
  data: {jsonl: a.jsonl}
  tokens: 380B
  sequence_length: 8192
  phases:
    - {tokens: 300B}
    - tokens: 80B
      sequence_length: 32768
      global_batch_size: 192
      data: {jsonl: b.jsonl}
"""


def test_what_a_phase_leaves_out_is_as_in_the_training(load: Load) -> None:
    distill = load(PHASES).spec.distill
    assert distill is not None
    first, second = distill.phases
    assert (first.sequence_length, first.global_batch_size, first.data) == (8192, 768, None)
    assert (second.sequence_length, second.global_batch_size, second.micro_batch_size) == (32768, 192, None)
    alone = distill.alone(second)
    assert alone.data.jsonl == ("b.jsonl",) and alone.tokens == 80 * 10**9 and alone.phases == ()
    assert distill.alone(first).data.jsonl == ("a.jsonl",)


def test_the_warm_up_fits_the_steps_of_all_phases(load: Load) -> None:
    short = PHASES.replace("380B", "9M").replace("300B", "8M").replace("80B", "1M").replace("32768", "1024")
    distill = load(short.replace("batch_size: 192", "batch_size: 1")).spec.distill
    assert distill is not None
    (first, _), batch = distill.phases, distill.global_batch_size
    assert batch == 3 and first.global_batch_size == 3
    assert distill.optimizer.warmup_steps == int(0.02 * (8 * 10**6 // (8192 * 3) + 10**6 // 1024))


@pytest.mark.parametrize(
    ("before", "after", "line", "path", "message", "hint"),
    [
        ("380B", "300B", 7, "distill.phases", "the phases' `tokens` make 380B, and `tokens` of the training is 300B",
         "write `tokens: 380000000000` above them"),
        ("tokens: 80B", "tokens: 80", 9, "distill.phases.1.tokens", "80 tokens are less than one global batch",
         "write at least 6291456"),
        ("  phases:", "  global_batch_size: [64, 128]\n  phases:", 8, "distill.phases", "which names several",
         "write one size above them"),
        ("  phases:", "  teacher_logits: {sampled: 4}\n  phases:", 8, "distill.phases", "stored samples of the teacher",
         "`teacher_logits: online`"),
        ("sequence_length: 32768", "sequnce_length: 32768", 10, "distill.phases.1.sequnce_length", "unknown key",
         "`sequence_length`"),
        ("data: {jsonl: b.jsonl}", "data: {blend: [{jsonl: b.jsonl, tokens: 1B}, {jsonl: c.jsonl, tokens: 2B}]}", 12,
         "distill.phases.1.data.blend", "the parts' `tokens` make 3B, and `distill.phases.1.tokens` is 80B",
         "write `distill.phases.1.tokens: 3000000000`"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be(
    errors_of: Errors, before: str, after: str, line: int, path: str, message: str, hint: str
) -> None:
    assert before in PHASES
    errors = errors_of(PHASES.replace(before, after))
    error = next(one for one in errors if one.path == path)
    assert error.line == line
    assert message in error.message and hint in error.hint


def test_held_out_text_is_in_no_phase(errors_of: Errors) -> None:
    (error,) = errors_of(PHASES + "evaluate: {held_out: {jsonl: b.jsonl}}\n")
    assert (
        error.path == "evaluate.held_out" and "`b.jsonl` is trained on as well, under `distill.phases." in error.message
    )
    megatron = PHASES.replace("data: {jsonl: b.jsonl}", "data: {megatron: b.bin}")
    (error,) = errors_of(megatron + "evaluate: {held_out: {fraction: 1%}}\n")
    assert "no document of them can be left out" in error.message
