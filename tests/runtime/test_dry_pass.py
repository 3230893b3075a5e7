"""The dry pass, with out-of-memory errors that are planted: only a GPU has real ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.runtime import arrivals, dry_pass, loop, train
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from tests.runtime import gated_tokenizer, tiny

Refuses = Callable[[Any, Any], bool]

SHORT = {"tokens": 16 * 4 * 6, "sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 1, "data": None}
LONG = {"tokens": 32 * 4 * 3, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 4, "data": None}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Refuses], None]:
    """Makes this CPU a device that is tried, and that has no memory for what `refuses` says of a run and a batch."""
    real = dry_pass.micro_batch_loss

    def become(refuses: Refuses) -> None:
        def loss(run: Any, batch: Any, *more: Any) -> Any:
            if refuses(run, batch):
                raise torch.OutOfMemoryError("planted")
            return real(run, batch, *more)

        monkeypatch.setattr(dry_pass, "micro_batch_loss", loss)
        monkeypatch.setattr(loop, "check_memory", dry_pass.dry_pass)

    return become


def rows(batch: Any) -> int:
    return int(batch.input_ids_BL.shape[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer__states": "int8", "weights": "bfloat16"},
        {"loss__hidden_states": {"pairs": [[1, 1], [0, 0]]}, "gradient_checkpointing": "attention"},
    ],
)
def test_what_fits_is_trained_as_if_it_had_not_been_tried(
    build: Path, tmp_path: Path, device: Callable[[Refuses], None], changes: dict[str, Any]
) -> None:
    tiny.write_plan(build, **changes)
    shutil.copytree(build.parent, tmp_path / "there")
    train(build, device="cpu", progress=Silent())
    device(lambda run, batch: False)
    train(tmp_path / "there" / "build", device="cpu", progress=Silent())
    one, two = (folder / "model" / "model.safetensors" for folder in (build, tmp_path / "there" / "build"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("changes", "refuses", "message"),
    [
        ({"micro_batch_size": 4}, lambda run, batch: rows(batch) > 1,
         r"no memory left for a micro batch of 4 x 16 tokens; write `micro_batch_size: 1` in training.yaml, which was tried"),
        ({}, lambda run, batch: not run.student.module.is_gradient_checkpointing,
         r"a micro batch of 2 x 16 tokens; write `gradient_checkpointing: true` in training.yaml, which was tried and fits"),
        ({}, lambda run, batch: rows(batch) > 1 or not run.student.module.is_gradient_checkpointing,
         r"write `gradient_checkpointing: true` and `micro_batch_size: 1` in training.yaml, which was tried and fits"),
        ({"gradient_checkpointing": True}, lambda run, batch: True,
         r"write `micro_batch_size: 1`, or `layout.cpu_offload: true` with `layout.student: sharded`, or begin again with"),
        ({"tokens": 768, "phases": [SHORT, LONG]}, lambda run, batch: batch.input_ids_BL.numel() > 64,
         r"a micro batch of 4 x 32 tokens; write `phases.1.micro_batch_size: 2` in training.yaml, which was tried and fits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_the_first_step_with_what_would(
    build: Path, device: Callable[[Refuses], None], changes: dict[str, Any], refuses: Refuses, message: str
) -> None:
    tiny.write_plan(build, **changes)
    device(refuses)
    with pytest.raises(WorkError, match=message):
        train(build, device="cpu", progress=Silent())
    assert tiny.read_metrics(build / "train" / "metrics.jsonl") == []


def test_the_moments_need_room_too(
    build: Path, monkeypatch: pytest.MonkeyPatch, device: Callable[[Refuses], None]
) -> None:
    def none(*_args: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    device(lambda run, batch: False)
    monkeypatch.setattr(dry_pass, "moments_like", none)
    with pytest.raises(WorkError, match=r"begin again with `weights: bfloat16` and `optimizer.states: int8`"):
        train(build, device="cpu", progress=Silent())


def test_on_a_cpu_nothing_is_tried(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(run: Any) -> None:
        raise AssertionError("a CPU does not run out in a way that can be tried")

    monkeypatch.setattr(dry_pass, "dry_pass", tried)
    train(build, device="cpu", progress=Silent())


def test_phases_whose_data_is_not_there_yet_are_tried_with_random_tokens(
    build: Path, device: Callable[[Refuses], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tokenized before both lengths have been tried."""
    gate, seen = build.parent / "gate", dict[int, int]()
    gate.mkdir()
    (gate / "closed").write_text("0")
    monkeypatch.setattr(arrivals, "COMMAND", gated_tokenizer.COMMAND)
    monkeypatch.setenv(gated_tokenizer.VARIABLE, str(gate))

    def look(run: Any, batch: Any) -> bool:
        seen[batch.input_ids_BL.shape[1]] = len(batch.input_ids_BL.unique())
        if set(seen) == {16, 32}:
            (gate / "closed").unlink(missing_ok=True)
        return False

    device(look)
    tiny.write_plan(build, tokens=768, phases=[SHORT, LONG], shuffle={"block": 256})
    train(build, device="cpu", progress=Silent())
    assert seen[32] > 90, "no text of 128 tokens has so many different ones"
    assert len(tiny.read_metrics(build / "train" / "metrics.jsonl")) == 9
