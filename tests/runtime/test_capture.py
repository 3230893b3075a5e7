"""`capture`: what is stored, how it goes on, and that training from it needs no teacher."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron.runtime import record, train
from minitron.runtime.data import Data, Wanted, data_hash, open_corpus
from minitron.runtime.models import load_model
from minitron.runtime.plan import read_training_plan
from minitron.runtime.teacher_logits import StoredLogits, read_index, read_shard, shard_path
from minitron.runtime.tokens import TextEncoder
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.progress import Progress, Silent
from tests.runtime import processes, tiny
from tests.runtime.listening import AtStep, Messages
from tests.runtime.test_training import run

# Shards of 8 sequences, so that a tiny training has six of them.
SAMPLED: dict[str, Any] = {"teacher_logits": {"sampled": 6}}
SAMPLES = 48


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.runtime.teacher_logits._SHARD_TOKENS", (8 * 16, 8 * 16))


def store(build: Path, progress: Progress | None = None, **changes: Any) -> dict[str, Any]:
    """Captures on the CPU. `changes` are written to training.yaml first."""
    tiny.write_plan(build, **SAMPLED | changes)
    return record(build, device="cpu", progress=progress or Silent())


def files(build: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (build / "teacher_logits").iterdir()}


@pytest.fixture(scope="module")
def captured(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build whose teacher was captured. Nobody writes to it."""
    here = tmp_path_factory.mktemp("captured") / "here"
    shutil.copytree(tiny_build.parent, here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron.runtime.teacher_logits._SHARD_TOKENS", (8 * 16, 8 * 16))
        store(here / "build")
    return here / "build"


@pytest.fixture
def ready(captured: Path, tmp_path: Path) -> Path:
    """A copy of it to work in."""
    shutil.copytree(captured.parent, tmp_path / "ready")
    return tmp_path / "ready" / "build"


def test_it_says_what_it_stored(build: Path) -> None:
    stored = store(build)
    size = sum(path.stat().st_size for path in (build / "teacher_logits").glob("shard-*"))
    assert stored["samples"] == SAMPLES and stored["tokens"] == SAMPLES * 16 and stored["bytes"] == size
    assert len(list((build / "teacher_logits").glob("shard-*"))) == 6


def test_samples_are_those_of_the_teacher(captured: Path) -> None:
    """Every draw of a token lies where its points fall in the teacher's own distribution; entropies are the teacher's."""
    loaded = read_training_plan(captured)
    plan = loaded.training()
    encoder = TextEncoder.load(captured / plan.tokenizer)
    corpus = open_corpus(
        Data.read(loaded.data("data", plan.data)),
        encoder,
        captured / "train" / "data",
        Wanted(length=16, tokens=plan.tokens, seed=0),
        Silent(),
    )
    index = read_index(captured / "teacher_logits")
    assert index is not None and index.samples == SAMPLES
    targets = StoredLogits(captured / "teacher_logits", index, 6).read(range(SAMPLES))
    teacher = load_model(loaded, "teacher", plan.teacher, torch.float32, torch.device("cpu"))
    batch = corpus.batch(range(SAMPLES))
    with torch.no_grad():
        q_TV = batch.pick(teacher.module(batch.input_ids_BL).logits).double().softmax(-1)
    torch.testing.assert_close(targets.weights_TN.sum(-1), torch.ones(len(q_TV)))
    assert targets.entropy == pytest.approx(float(-(q_TV * q_TV.log()).sum()), rel=1e-5)
    expected_TN = 6 * q_TV.gather(-1, targets.ids_TN)
    drawn_TN = 6 * targets.weights_TN.double()
    there = targets.weights_TN > 0
    assert bool(((drawn_TN - expected_TN).abs() < 1.0 + 1e-4)[there].all())  # rounded up or down
    # And no token that must come is missing: what is expected once or more was drawn.
    weights_TV = torch.zeros_like(q_TV).scatter_add_(1, targets.ids_TN, targets.weights_TN.double())
    assert bool((weights_TV[6 * q_TV > 1.0 + 1e-4] > 0).all())


def test_it_is_compact(captured: Path) -> None:
    shard = read_shard(captured / "teacher_logits", 0, read_index(captured / "teacher_logits").key)  # type: ignore[union-attr]
    assert (shard.ids.dtype, shard.counts.dtype, shard.unique.dtype) == (np.uint16, np.uint8, np.uint8)
    assert len(shard.ids) == shard.unique.sum() and shard.tokens.sum() == len(shard.unique)


def test_again_it_only_looks(ready: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ready / "teacher_logits").iterdir()}
    store(ready)
    assert {path: path.stat().st_mtime_ns for path in (ready / "teacher_logits").iterdir()} == before


def test_neither_the_cut_nor_a_kill_changes_a_byte(captured: Path, build: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        store(build, AtStep(9, lambda: signal.raise_signal(signal.SIGTERM), "capture"))
    assert 1 < len(files(build)) < len(files(captured))
    store(build)
    assert files(build) == files(captured)


def test_killed_while_a_shard_is_written(captured: Path, build: Path) -> None:
    tiny.write_plan(build, **SAMPLED)
    assert processes.capture_in_process(build, processes.kill_during_third_shard) is None
    assert any(name.endswith(".tmp") for name in files(build))
    assert processes.capture_in_process(build, processes.small_shards) == "done"
    assert files(build) == files(captured)


def test_two_ranks_share_the_shards(captured: Path, build: Path) -> None:
    tiny.write_plan(build, **SAMPLED)
    assert processes.capture_on_ranks(build, 2) == ["done", "done"]
    assert files(build) == files(captured)


def test_a_teacher_that_is_spread_over_the_ranks(captured: Path, build: Path) -> None:
    """3 ranks and 6 shards, one of which is there: one rank has less to do and still helps to gather."""
    tiny.write_plan(build, **SAMPLED, layout__teacher="sharded")
    (build / "teacher_logits").mkdir()
    for name in ("index.json", "shard-00000001.safetensors"):
        shutil.copy(captured / "teacher_logits" / name, build / "teacher_logits")
    assert processes.capture_on_ranks(build, 3) == ["done"] * 3
    assert files(build) == files(captured)


def test_a_longer_training_adds_to_it(ready: Path, captured: Path) -> None:
    store(ready, tokens=64 * 20)
    assert {name: files(ready)[name] for name in files(captured) if name != "index.json"} == {
        name: content for name, content in files(captured).items() if name != "index.json"
    }
    assert len(files(ready)) == 11 and read_index(ready / "teacher_logits").samples == 80  # type: ignore[union-attr]
    store(ready, tokens=64 * 5)  # a shorter one takes nothing away
    assert read_index(ready / "teacher_logits").samples == 80  # type: ignore[union-attr]


def test_another_training_makes_it_anew(ready: Path, captured: Path) -> None:
    progress = Messages()
    store(ready, progress, seed=5)
    assert "the stored teacher logits are of another training (seed changed): they are made again" in progress.texts
    assert files(ready)["shard-00000000.safetensors"] != files(captured)["shard-00000000.safetensors"]


def test_training_needs_no_teacher(ready: Path) -> None:
    shutil.rmtree(ready.parent / "teacher")
    lines = run(ready, **SAMPLED)
    assert lines[-1]["forward_kl"] < lines[0]["forward_kl"] and (ready / "model" / "config.json").is_file()


def test_training_from_samples_is_nearly_the_online_one(build: Path, tmp_path: Path) -> None:
    """The same first loss but for the noise of the samples, and a student as good on text it has not seen."""
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    longer: dict[str, Any] = {"tokens": 64 * 40, "optimizer__lr": 1e-2, "global_batch_size": 4}
    online = run(build, **longer)
    store(tmp_path / "there" / "build", **longer | {"teacher_logits": {"sampled": 24}})
    sampled = run(tmp_path / "there" / "build", **longer | {"teacher_logits": {"sampled": 24}})
    assert sampled[0]["forward_kl"] == pytest.approx(online[0]["forward_kl"], rel=0.1)
    assert sampled[-1]["forward_kl"] == pytest.approx(online[-1]["forward_kl"], rel=0.25)
    assert sampled[-1]["held_out_loss"] == pytest.approx(online[-1]["held_out_loss"], rel=0.02)


def test_how_a_batch_is_cut_changes_nothing(ready: Path, tmp_path: Path) -> None:
    shutil.copytree(ready.parent, tmp_path / "other")
    one = [line["loss"] for line in run(ready, **SAMPLED)]
    other = [line["loss"] for line in run(tmp_path / "other" / "build", **SAMPLED, micro_batch_size=1)]
    assert one == pytest.approx(other, rel=1e-5)


def test_samples_of_a_corrected_teacher(build: Path) -> None:
    correction = {
        "tokens": 64 * 4, "every_tokens": 64 * 4, "output": "teacher", "work": "train/teacher",
        "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2},
    }  # fmt: skip
    progress = Messages()
    store(build, progress, teacher_correction=correction)
    assert any(text.startswith("corrected the teacher") for text in progress.texts)
    shutil.rmtree(build.parent / "teacher")
    run(build, **SAMPLED, teacher_correction=correction)
    with pytest.raises(SpecInvalid, match=r"teacher_correction\.tokens"):
        run(build, **SAMPLED, teacher_correction=correction | {"tokens": 64 * 8})


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_a_plan_with_the_teacher_beside_the_student(build: Path) -> None:
    with pytest.raises(UsageError, match=r"there is nothing to store; write `teacher_logits: \{sampled: 12\}`"):
        store(build, teacher_logits="online")


def test_training_before_capturing(build: Path) -> None:
    with pytest.raises(UsageError, match=r"has no stored teacher logits, .* run: minitron capture .*build"):
        run(build, **SAMPLED)


def test_training_on_more_than_was_captured(ready: Path) -> None:
    with pytest.raises(UsageError, match="holds 48 of 80 sequences; run: minitron capture"):
        run(ready, **SAMPLED, tokens=64 * 20)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 7}, "seed"),
        ({"teacher_logits": {"sampled": 9}}, r"teacher_logits\.sampled"),
        ({"loss__logits": {"temperature": 2.0}}, r"loss\.logits\.temperature"),
        ({"data": {"text": ["../train.txt"]}}, "data"),
        ({"teacher__dtype": "bfloat16"}, r"teacher\.dtype"),
    ],
)
def test_samples_of_another_training(ready: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SpecInvalid, match=rf"training\.yaml:\d+:\d+: teacher_logits: .* other settings \({what}\)"):
        run(ready, **SAMPLED | changes)


def test_samples_of_another_teacher(ready: Path) -> None:
    tiny.save_model(tiny.llama(24), ready.parent / "teacher", seed=9)
    with pytest.raises(SpecInvalid, match=r"were drawn with other settings \(teacher\.weights\)"):
        run(ready, **SAMPLED)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone"])
def test_a_damaged_shard_is_never_learnt_from_and_made_again(ready: Path, captured: Path, damage: str) -> None:
    path = shard_path(ready / "teacher_logits", 2)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "a flipped bit" else bytes(content[:-100]))
    with pytest.raises(WorkError, match="is gone" if damage == "gone" else "was put aside as damaged-shard-00000002"):
        run(ready, **SAMPLED)
    store(ready)
    assert path.read_bytes() == shard_path(captured / "teacher_logits", 2).read_bytes()
    run(ready, **SAMPLED)


def test_a_full_disk_keeps_the_shards_that_are_there(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.runtime import teacher_logits

    real, written = teacher_logits.save_file, []

    def full(arrays: Any, path: Path, metadata: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(arrays, path, metadata=metadata)

    monkeypatch.setattr(teacher_logits, "save_file", full)
    with pytest.raises(
        WorkError, match=r"shard-00000002\.safetensors could not be written: the disk is full; make room"
    ):
        store(build)
    assert sorted(files(build)) == ["index.json", "shard-00000000.safetensors", "shard-00000001.safetensors"]
    assert json.loads((build / "teacher_logits" / "index.json").read_text())["samples"] == 0


def test_data_hash_is_what_names_the_data(captured: Path) -> None:
    loaded = read_training_plan(captured)
    plan = loaded.training()
    encoder = TextEncoder.load(captured / plan.tokenizer)
    index = read_index(captured / "teacher_logits")
    assert index is not None
    assert index.identity["data"] == data_hash(Data.read(loaded.data("data", plan.data)), encoder, plan.tokens)


def test_training_is_refused_while_it_is_captured(build: Path) -> None:
    tiny.write_plan(build, **SAMPLED)

    def start_training() -> None:
        with pytest.raises(UsageError, match="another process is capturing"):
            train(build, device="cpu", progress=Silent())

    record(build, device="cpu", progress=AtStep(2, start_training, "capture"))
