"""A short spec: what one block takes from another, and defaults that fit the tokens that are asked for."""

from __future__ import annotations

from .conftest import Errors, Load

SHORT = """\
teacher: {model: org/model}
student: {hidden_size: 64}
distill:
  data: {jsonl: a.jsonl, text_field: body}
  tokens: 1M
  sequence_length: 256
"""


def test_six_lines_are_a_spec(load: Load) -> None:
    spec = load(SHORT).spec
    data = spec.importance.data
    assert data is not None and spec.distill is not None
    assert (data.jsonl, data.text_field, data.sequence_length, data.samples) == (("a.jsonl",), "body", 256, 1024)
    assert load(SHORT + "importance: {data: {text: b.txt}}\n").spec.importance.data.text == ("b.txt",)  # type: ignore[union-attr]
    assert load(SHORT + "importance: {depth: {contiguous: true}}\n").spec.importance.depth.contiguous
    assert load(SHORT.replace("  sequence_length: 256\n", "")).spec.importance.data.sequence_length == 4096  # type: ignore[union-attr]
    named = SHORT.replace("hidden_size: 64", "layers: {drop: [1]}")
    assert load(named).spec.importance.data is None, "nothing is scored"


def test_a_mistake_in_shared_data_is_said_once_where_it_stands(errors_of: Errors) -> None:
    ((error,),) = [errors_of(SHORT.replace("text_field", "text_feld"))]
    assert (error.line, error.path) == (4, "distill.data.text_feld")


def test_batch_and_warm_up_fit_the_tokens(load: Load) -> None:
    distill = load(SHORT).spec.distill
    assert distill is not None and distill.global_batch_size == 13, "1M tokens of 256 in 300 steps"
    assert distill.optimizer.warmup_steps == 6, "2% of 300 steps"
    long = load(SHORT.replace("1M", "380B")).spec.distill
    assert long is not None and (long.global_batch_size, long.optimizer.warmup_steps) == (768, 60)
    written = SHORT + "  global_batch_size: 100\n  optimizer: {warmup_steps: 20}\n"
    distill = load(written).spec.distill
    assert distill is not None and (distill.global_batch_size, distill.optimizer.warmup_steps) == (100, 20)
    corrected = load(SHORT + "teacher_correction: {tokens: 100K}\n").spec.teacher_correction
    assert corrected is not None and corrected.optimizer.warmup_steps == 0
    assert load(SHORT).resolved["distill"]["global_batch_size"] == 13, "the plan says what was taken"
