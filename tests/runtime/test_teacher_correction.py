"""The teacher is fine-tuned on the data first: once, resumably, and the student learns from the result."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.runtime import evaluate, train
from minitron.runtime.correction import weights_digest
from minitron.specs.errors import SpecInvalid
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.listening import AtStep, Messages
from tests.runtime.test_training import run

CORRECTION: dict[str, Any] = {
    "tokens": 16 * 4 * 8,
    "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2},
    "every_tokens": 16 * 4 * 3,
    "output": "teacher",
    "work": "train/teacher",
}
# Random teachers have everything to learn; two steps of distillation are enough to see whom the student follows.
SHORT: dict[str, Any] = {"teacher_correction": CORRECTION, "tokens": 16 * 4 * 2}


def corrected(build: Path) -> dict[str, torch.Tensor]:
    return load_file(build / "teacher" / "model.safetensors")


@pytest.fixture(scope="module")
def done(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A build trained with a corrected teacher, and what was said. Nobody writes to it."""
    here = tmp_path_factory.mktemp("corrected") / "here"
    shutil.copytree(tiny_build.parent, here)
    (here / "teacher" / "pytorch_model.bin").write_bytes(b"old weights in a format that is not read")
    progress = Messages()
    run(here / "build", progress, **SHORT)
    return here / "build", progress.texts


def test_it_becomes_a_better_teacher_of_the_data_and_says_so(done: tuple[Path, list[str]]) -> None:
    build, said = done
    losses = json.loads((build / "teacher" / "correction.json").read_text())["held_out_loss"]
    assert losses["after"] < losses["before"] - 0.1
    assert f"corrected the teacher: held-out loss {losses['before']:.4f} before, {losses['after']:.4f} after" in said
    assert f"{losses['before']:.4f} nats a token before" in (build / "teacher" / "README.md").read_text()


def test_it_is_a_hugging_face_checkpoint_without_anything_old(done: tuple[Path, list[str]]) -> None:
    build, _ = done
    AutoModelForCausalLM.from_pretrained(build / "teacher")
    assert AutoTokenizer.from_pretrained(build / "teacher").vocab_size > 0
    assert not list((build / "teacher").glob("*.bin"))
    assert corrected(build).keys() == load_file(build.parent / "teacher" / "model.safetensors").keys()


def test_it_has_metrics_and_a_schedule_of_its_own(done: tuple[Path, list[str]]) -> None:
    build, _ = done
    own = [json.loads(line) for line in (build / "train" / "teacher" / "metrics.jsonl").read_text().splitlines()]
    assert len(own) == 8 and own[-1]["lr"] == pytest.approx(1e-4) and own[-1]["loss"] == own[-1]["cross_entropy"]
    student = [json.loads(line) for line in (build / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(student) == 2 and "forward_kl" in student[0]


def test_the_student_learns_from_it(done: tuple[Path, list[str]], build: Path) -> None:
    """The same losses as with the corrected teacher written down as the teacher."""
    first, _ = done
    shutil.copytree(first / "teacher", build.parent / "better")
    there = run(build, tokens=SHORT["tokens"], teacher__model="../better")
    lines = tiny.without_speed(
        [json.loads(line) for line in (first / "train" / "metrics.jsonl").read_text().splitlines()]
    )
    assert [line["loss"] for line in there] == [line["loss"] for line in lines]


def test_the_results_show_it_beside_the_teacher_as_it_was(done: tuple[Path, list[str]], tmp_path: Path) -> None:
    shutil.copytree(done[0].parent, tmp_path / "here")
    models = evaluate(tmp_path / "here" / "build", device="cpu", progress=Silent())["models"]
    assert list(models) == ["teacher", "corrected_teacher", "pruned", "distilled"]
    losses = json.loads((done[0] / "teacher" / "correction.json").read_text())["held_out_loss"]
    assert models["teacher"]["held_out"]["loss"] == pytest.approx(losses["before"], abs=1e-5)
    assert models["corrected_teacher"]["held_out"]["loss"] == pytest.approx(losses["after"], abs=1e-5)


def test_another_student_takes_it_as_it_is(done: tuple[Path, list[str]], tmp_path: Path) -> None:
    shutil.copytree(done[0].parent, tmp_path / "here")
    build = tmp_path / "here" / "build"
    for name in ("train", "model"):
        shutil.rmtree(build / name)
    before = (build / "teacher" / "model.safetensors").stat().st_mtime_ns
    progress = Messages()
    run(build, progress, **SHORT, fingerprint="another student", optimizer__lr=1e-4)
    assert (build / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    assert not any("corrected" in text for text in progress.texts)


@pytest.mark.parametrize("left", ["nothing", "the distillation"])
def test_a_changed_setting_makes_it_anew_and_is_refused_once_the_student_has_learnt_from_it(
    done: tuple[Path, list[str]], tmp_path: Path, left: str
) -> None:
    shutil.copytree(done[0].parent, tmp_path / "here")
    build = tmp_path / "here" / "build"
    changed = SHORT | {"teacher_correction": CORRECTION | {"tokens": 16 * 4 * 4}}
    before = corrected(build)
    if left == "nothing":
        shutil.rmtree(build / "model")
        shutil.rmtree(build / "train" / "checkpoints")
        (build / "train" / "finished.json").unlink()
        progress = Messages()
        run(build, progress, **changed)
        assert "the teacher was corrected with other settings (tokens): it is corrected again" in progress.texts
        assert any(not torch.equal(weight, before[name]) for name, weight in corrected(build).items())
    else:
        (build / "train" / "finished.json").unlink()
        with pytest.raises(
            SpecInvalid, match=r"teacher_correction\.tokens: was 512 when this training began and is now 256"
        ):
            run(build, **changed)
        assert all(torch.equal(weight, before[name]) for name, weight in corrected(build).items())


@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_it_goes_on_bit_for_bit(done: tuple[Path, list[str]], build: Path, step: int) -> None:
    tiny.write_plan(build, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        train(
            build, device="cpu", progress=AtStep(step, lambda: signal.raise_signal(signal.SIGTERM), "correct teacher")
        )
    assert not (build / "teacher").exists()
    progress = Messages()
    run(build, progress)
    assert f"going on from step {step} of 8" in progress.texts
    assert all(torch.equal(weight, corrected(build)[name]) for name, weight in corrected(done[0]).items())
    assert (build / "teacher" / "correction.json").read_bytes() == (
        done[0] / "teacher" / "correction.json"
    ).read_bytes()


def test_errors_stand_where_the_value_is(build: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"teacher_correction\.optimizer\.min_lr: 1 is higher than `lr`"):
        run(build, teacher_correction=CORRECTION | {"optimizer": {"lr": 0.1, "min_lr": 1.0}})
    with pytest.raises(SpecInvalid, match=r"yaml:\d+:\d+: teacher\.head\.weight: the model has no `lm_head\.wait`"):
        run(build, **SHORT, teacher__head=tiny.HEAD | {"weight": "lm_head.wait"})


def test_models_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        tiny.save_model(tiny.llama(16), tmp_path / name, seed=seed)
    one, same, other = (weights_digest(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other
