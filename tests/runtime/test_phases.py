"""A training of several phases: one curve and one schedule, data that is a function of phase and number, nothing lost at a
border.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron.runtime import record, train
from minitron.runtime.course import Course, corpus_seed
from minitron.runtime.plan import read_training_plan
from minitron.runtime.schedule import learning_rate
from minitron.specs.errors import MinitronError, SpecInvalid
from minitron.specs.progress import Silent
from minitron.specs.training_plan import TrainingPlan
from tests.runtime import processes, tiny
from tests.runtime.processes import train_in_process, train_on_ranks
from tests.runtime.tiny import read_metrics

SHORT = {"tokens": 16 * 4 * 6, "sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 2, "data": None}
LONG = {"tokens": 32 * 2 * 5, "sequence_length": 32, "global_batch_size": 2, "micro_batch_size": 2, "data": None}
OTHER = LONG | {"data": {"text": ["../valid.txt"], "document": "line"}}
SETTINGS: dict[str, Any] = {
    "tokens": 16 * 4 * 6 + 2 * 32 * 2 * 5,
    "phases": [SHORT, LONG, OTHER],
    "checkpoint": {"every_tokens": 64, "keep_last": 20},
    "held_out": {"data": {"text": ["../valid.txt"]}, "max_tokens": 200, "every_tokens": 64 * 5},
}


@pytest.fixture(scope="module")
def whole(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], bytes]:
    """What an undisturbed training ends with."""
    root = tmp_path_factory.mktemp("whole") / "here"
    shutil.copytree(tiny_build.parent, root)
    tiny.write_plan(root / "build", **SETTINGS)
    assert train_in_process(root / "build") == "done"
    return result(root / "build")


def result(build: Path) -> tuple[list[dict[str, Any]], bytes]:
    lines = tiny.without_speed(read_metrics(build / "train" / "metrics.jsonl"))
    return lines, (build / "model" / "model.safetensors").read_bytes()


def test_one_curve_and_one_schedule(whole: tuple[list[dict[str, Any]], bytes]) -> None:
    lines, _ = whole
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 17)]
    optimizer = tiny.plan()["optimizer"]
    rates = [line["lr"] for line in lines]
    assert rates[1] == max(rates) == optimizer["lr"] and rates[-1] == optimizer["min_lr"]
    assert rates[2:] == sorted(rates[2:], reverse=True), "no phase begins a schedule of its own"


@pytest.mark.parametrize("step", [6, 11])
def test_killed_at_a_border_it_ends_with_the_same_bytes(
    build: Path, whole: tuple[list[dict[str, Any]], bytes], step: int
) -> None:
    """6: the last step of the first phase is saved and the second has not begun; 11: the same of the third."""
    tiny.write_plan(build, **SETTINGS)
    kill = processes.kill_at_seventh_step if step == 6 else processes.kill_at_twelfth_step
    assert train_in_process(build, kill) is None
    newest = max(one.name for one in (build / "train" / "checkpoints").glob("step-*[0-9]"))
    assert int(newest[5:]) in (step - 1, step)
    assert train_in_process(build) == "done"
    assert result(build) == whole


def test_two_ranks_learn_the_same(build: Path, whole: tuple[list[dict[str, Any]], bytes]) -> None:
    tiny.write_plan(build, **SETTINGS)
    assert train_on_ranks(build, 2) == ["done", "done"]
    two = read_metrics(build / "train" / "metrics.jsonl")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in whole[0]], rel=1e-5)


def test_each_phase_learns_from_its_own_data(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each step reads is what its corpus has under the numbers of the step."""
    from minitron.runtime import loop

    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    real = loop.train_step

    def train_step(run: Any, state: Any) -> Any:
        stretch = run.course.at(state.step)
        first = stretch.first(state.step)
        numbers = range(first, first + stretch.phase.global_batch_size)
        expected = run.corpora[stretch.corpus].batch(numbers).input_ids_BL
        given_batch = run.feed.take(state.step).batch.input_ids_BL
        seen.append((stretch.number, given_batch, expected))
        return real(run, state)

    monkeypatch.setattr(loop, "train_step", train_step)
    tiny.write_plan(build, **SETTINGS)
    train(build, device="cpu", progress=Silent())
    assert [number for number, _, _ in seen] == [0] * 6 + [1] * 5 + [2] * 5
    for _, read, expected in seen:
        assert torch.equal(read, expected)
    assert {read.shape for _, read, _ in seen} == {(4, 16), (2, 32)}


def test_phases_that_change_the_batch_alone_go_on_with_the_data(build: Path) -> None:
    """The same text in the same lengths: no sequence comes twice before all have come."""
    wider = SHORT | {"tokens": 16 * 8 * 3, "global_batch_size": 8}
    tiny.write_plan(build, tokens=16 * 4 * 6 + 16 * 8 * 3, phases=[SHORT, wider])
    course = Course.of(read_training_plan(build).training())
    numbers = [
        number
        for step in range(9)
        for number in range(
            course.at(step).first(step), course.at(step).first(step) + course.at(step).phase.global_batch_size
        )
    ]
    assert numbers == list(range(6 * 4 + 3 * 8)) and {one.corpus for one in course.stretches} == {0}
    assert course.corpora() == [(course.stretches[0], 16 * 4 * 6 + 16 * 8 * 3)]


@given(
    st.lists(st.tuples(st.integers(1, 900), st.sampled_from([16, 32]), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 2**40),
)
def test_every_step_has_one_place(phases: list[tuple[int, int, int]], seed: int) -> None:
    document = tiny.plan(
        tokens=sum(tokens for tokens, _, _ in phases),
        phases=[
            {"tokens": n, "sequence_length": length, "global_batch_size": batch, "micro_batch_size": 1, "data": None}
            for n, length, batch in phases
        ],
    )
    plan = TrainingPlan.model_validate(document)
    course = Course.of(plan)
    state, taken = course.state(0), dict[int, int]()
    for step in range(plan.steps):
        stretch, after = course.at(step), course.state(step + 1)
        assert after.samples - state.samples == stretch.phase.global_batch_size
        assert after.tokens - state.tokens == stretch.phase.step_tokens
        assert stretch.first(step) == taken.get(stretch.corpus, 0)
        taken[stretch.corpus] = stretch.first(step) + stretch.phase.global_batch_size
        state = after
    assert (state.step, state.tokens) == (plan.steps, plan.trained_tokens)
    seeds = [corpus_seed(seed, corpus) for corpus in taken]
    assert len(set(seeds)) == len(seeds) and seeds[0] == seed


@given(st.integers(1, 200), st.integers(0, 20), st.integers(1, 1 << 30))
def test_steps_of_equal_size_have_the_schedule_that_they_had(steps: int, warmup: int, tokens: int) -> None:
    optimizer = TrainingPlan.model_validate(tiny.plan()).optimizer.model_copy(update={"warmup_steps": warmup})
    for step in range(steps):
        assert learning_rate(step, steps, optimizer, lambda n: n * tokens) == learning_rate(step, steps, optimizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 4000}, r"phases: the phases' `tokens` make 1024, and `tokens` of the training is 4K; write `tokens: 1024`"),
        (
            {"tokens": 404, "phases": [SHORT, LONG | {"tokens": 20}]},
            r"phases.1.tokens: 20 tokens are less than one global batch, 2 x 32 = 64 tokens",
        ),
        ({"teacher_logits": {"sampled": 4}}, r"phases: stored samples of the teacher are of sequences of one length"),
        (
            {"tokens": 1028, "phases": [SHORT, LONG | {"sequence_length": 322, "tokens": 644}]},
            r"phases.1.sequence_length: 322 tokens are more than the 256 that the models can read",
        ),
        (
            {"phases": [SHORT, LONG, OTHER | {"data": {"text": ["../none.txt"]}}]},
            r"phases.2.data.text.0: there is no file `../none.txt`",
        ),
    ],
)  # fmt: skip
def test_phases_that_cannot_be(build: Path, changes: dict[str, Any], message: str) -> None:
    tiny.write_plan(build, **SETTINGS | changes)
    with pytest.raises(SpecInvalid, match=message):
        train(build, device="cpu", progress=Silent())


def test_a_phase_that_changed_is_another_training(build: Path) -> None:
    tiny.write_plan(build, **SETTINGS)
    assert train_in_process(build, processes.kill_at_seventh_step) is None
    tiny.write_plan(build, **SETTINGS | {"phases": [SHORT, LONG | {"global_batch_size": 5}, OTHER]})
    with pytest.raises(MinitronError, match=r"phases.1.global_batch_size: was 2 when this training began and is now 5"):
        train(build, device="cpu", progress=Silent())
    other = OTHER | {"data": {"text": ["../valid.txt"], "document": "file"}}
    tiny.write_plan(build, **SETTINGS | {"phases": [SHORT, LONG, other]})
    with pytest.raises(MinitronError, match="the training data or its tokenizer changed since this training began"):
        train(build, device="cpu", progress=Silent())


def test_a_corrected_teacher_and_stored_samples_know_no_phases(build: Path) -> None:
    correction = {
        "tokens": 64 * 2, "optimizer": {"lr": 3e-3, "warmup_steps": 1}, "every_tokens": 64 * 2, "output": "teacher",
        "work": "train/teacher",
    }  # fmt: skip
    tiny.write_plan(build, **SETTINGS, teacher_correction=correction)
    train(build, device="cpu", progress=Silent())
    corrected = read_metrics(build / "train" / "teacher" / "metrics.jsonl")
    assert [line["tokens"] for line in corrected] == [64, 128]
    tiny.write_plan(build, **SETTINGS | {"teacher_logits": {"sampled": 4}})
    with pytest.raises(SpecInvalid, match="phases may have several"):
        record(build, device="cpu", progress=Silent())
