"""The driver: what a compile keeps, what it takes up again, and that a student follows its layers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron.compiler import compile_spec, score
from minitron.compiler.compilation import Work
from minitron.compiler.importance import batches, progress_file
from minitron.compiler.importance.select import Selection
from minitron.compiler.out_of_memory import told_in_a_sentence
from minitron.specs.atomic import MARKER, temporary_path
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.locks import LOCK, only_one
from minitron.specs.progress import Silent
from tests.foundry import WITHOUT_PROGRAM, Build, Foundry, load_model, logits, teacher_model, token_ids
from tests.models import text

FFN = {"intermediate_size": 24}


class Words(Silent):
    """Remembers what was said and which tasks were begun."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.tasks: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        self.tasks.append(name)
        return super().task(name, total, unit, done)


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        (
            "cuda:1",
            torch.OutOfMemoryError("CUDA out of memory"),
            r"the device cuda:1 has .*--memory 8GiB`, say, or write --dev",
        ),
        (
            "cuda:1",
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            r"this machine has .* say$",
        ),
        ("cpu", MemoryError(), r"this machine has no memory left; make memory free, or let calibration take"),
    ],
)
def test_a_lack_of_memory_is_told_with_what_takes_less(device: str, error: Exception, words: str) -> None:
    with pytest.raises(WorkError, match=words), told_in_a_sentence(device):
        raise error
    with pytest.raises(RuntimeError, match="another"), told_in_a_sentence(device):
        raise RuntimeError("another")


def test_a_compile_without_memory_leaves_nothing_half_done(foundry: Foundry, tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), FFN)
    with pytest.raises(WorkError, match="this machine has no memory left; make memory free"):
        foundry.compile(loaded, tmp_path / "build", stages=replace(WITHOUT_PROGRAM, score=full))
    assert not list((tmp_path / "build").rglob("*.tmp"))


# -- layers -------------------------------------------------------------------------------------------------------------


def without_layers(build: Build) -> Any:
    """The teacher as a Hugging Face model that has lost the dropped layers, lists over layers included."""
    model, kept = teacher_model(build.plan), build.document("plan.json")["selection"]["num_hidden_layers"][0]
    layers = model.get_submodule(build.plan.teacher.captured.layer_path)
    for layer in reversed(range(len(layers))):
        if layer not in kept:
            del layers[layer]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in kept]
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("dropped", [[0], [2], [0, 1], [1, 2], [1, 3], [0, 3]])
@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_named_layers_go_with_their_attention_type(foundry: Foundry, family: str, dropped: list[int]) -> None:
    """Neighbours and others, first and last; no data is needed where nothing is scored."""
    teacher = foundry.teacher(family, num_hidden_layers=4)
    build = foundry.build(teacher, {"layers": {"drop": dropped}}, importance=None, program=False)
    whole, kept = teacher_model(build.plan).config.layer_types, [i for i in range(4) if i not in dropped]
    assert build.config["layer_types"] == [whole[i] for i in kept]
    assert build.config["num_hidden_layers"] == len(kept)
    ids = token_ids(2, 40)
    student = load_model(build.folder / "student", build.plan.teacher.captured.attention)
    torch.testing.assert_close(logits(student, ids), logits(without_layers(build), ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [(1, 2), (1, 3), (0, 3)])
def test_layers_that_scores_choose_go_with_their_attention_type(foundry: Foundry, tmp_path: Path, kept: Any) -> None:
    """Which they are is known only after the plan was made."""
    loaded = foundry.load(foundry.teacher("gemma2", num_hidden_layers=4), {"num_hidden_layers": 2})
    build = foundry.compile(loaded, tmp_path, program=False, selection=Selection(kept))
    whole = teacher_model(build.plan).config.layer_types
    assert build.config["layer_types"] == [whole[i] for i in kept]
    ids = token_ids(2, 40)
    got = logits(load_model(build.folder / "student", build.plan.teacher.captured.attention), ids)
    torch.testing.assert_close(got, logits(without_layers(build), ids), rtol=1e-4, atol=1e-5)


def test_the_least_influential_layers_are_dropped_or_a_run_of_them(foundry: Foundry) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=4)
    scattered = foundry.build(teacher, {"num_hidden_layers": 2}, program=False)
    scores = scattered.tensors_of("scores.safetensors")["num_hidden_layers"].numpy()
    kept = scattered.document("plan.json")["selection"]["num_hidden_layers"][0]
    assert kept == sorted(np.argsort(-scores)[:2].tolist())
    importance = {"data": foundry.calibration, "depth": {"contiguous": True}}
    run = foundry.build(teacher, {"num_hidden_layers": 2}, program=False, importance=importance)
    dropped = sorted(set(range(4)) - set(run.document("plan.json")["selection"]["num_hidden_layers"][0]))
    sums = [scores[i] + scores[i + 1] for i in range(3)]
    assert dropped == [int(np.argmin(sums)), int(np.argmin(sums)) + 1]


# -- the build folder ---------------------------------------------------------------------------------------------------


def test_the_build_folder(foundry: Foundry) -> None:
    build = foundry.build(foundry.teacher("llama", num_hidden_layers=2), FFN)
    assert {path.name for path in build.folder.iterdir()} == {
        ".minitron",
        ".minitron.lock",
        "plan.json",
        "scores.safetensors",
        "student",
        "student.pt2",
        "training.yaml",
        "verification.json",
    }
    assert {path.name for path in (build.folder / "student").iterdir()} == {
        ".minitron",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_spec_gives_the_same_bytes(foundry: Foundry, tmp_path: Path) -> None:
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), {**FFN, "hidden_size": 24})
    first = foundry.compile(loaded, tmp_path / "a", program=False)
    second = foundry.compile(loaded, tmp_path / "b", program=False)
    assert digests(first.folder / "student") == digests(second.folder / "student")
    for name in ("scores.safetensors", "verification.json", "plan.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_what_killed_compiles_left_is_removed(foundry: Foundry, tmp_path: Path) -> None:
    temporary_path(tmp_path / "student", 17).mkdir()
    (temporary_path(tmp_path / "student", 17) / "part-0.safetensors").write_bytes(b"half")
    temporary_path(tmp_path / "scores.safetensors", 17).write_bytes(b"half")
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), FFN)
    foundry.compile(loaded, tmp_path, program=False)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


# -- scores that are there already --------------------------------------------------------------------------------------


@pytest.fixture
def scored(foundry: Foundry, tmp_path: Path) -> Build:
    """A compile of its own teacher and corpus, to be changed at will."""
    from tests.models import save_teacher, tiny_config

    teacher = save_teacher(tmp_path / "teacher", tiny_config("llama", num_hidden_layers=2))
    (tmp_path / "mine.txt").write_text(text(60))
    data = foundry.calibration | {"text": [str(tmp_path / "mine.txt")]}
    return foundry.compile(foundry.load(teacher, FFN, importance={"data": data}), tmp_path / "build", program=False)


def again(foundry: Foundry, scored: Build, student: dict[str, Any] = FFN, **importance: Any) -> list[str]:
    """Compiles into the same folder; the tasks that were begun."""
    words = Words()
    data = scored.loaded.spec.importance.data
    assert data is not None
    block = {"data": foundry.calibration | {"text": list(data.text or ())}} | importance
    loaded = foundry.load(scored.teacher, student, importance=block)
    foundry.compile(loaded, scored.folder, words, program=False)
    assert ("calibrate" in words.tasks) != any("scores: taken from" in message for message in words.messages)
    return words.tasks


class Interrupting(Words):
    """Interrupts the calibration at its `at`th batch; keeps how many were done before it began."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left, self.before = at, -1.0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Any]:
        self._in = name
        if name == "calibrate":
            self.before = done
        yield self

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        self.left -= self._in == "calibrate"
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_calibration_goes_on_where_less_memory_is_free_than_before(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what it took; one that is told to take less begins anew."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)
    monkeypatch.setattr(progress_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(progress_file, "SAVE_SHARE", 1e9)
    loaded = foundry.load(foundry.teacher("llama"), FFN)
    whole = foundry.compile(loaded, tmp_path / "whole", program=False)
    with pytest.raises(KeyboardInterrupt):
        foundry.compile(loaded, tmp_path / "build", Interrupting(9), program=False)
    monkeypatch.setattr(score, "free_memory", lambda device: 1)
    shutil.copytree(tmp_path / "build", tmp_path / "told")
    again = Interrupting(-1)
    foundry.compile(loaded, tmp_path / "build", again, program=False)
    assert again.before == 8, "the last step is done again"
    told = Interrupting(-1)
    compile_spec(loaded, tmp_path / "told", device="cpu", progress=told, stages=WITHOUT_PROGRAM, work=Work(memory=1))
    assert told.before == 0
    (least,) = (one for one in told.messages if one.startswith("calibrate: takes about"))
    assert re.fullmatch(
        r"calibrate: takes about \d+ MiB, and --memory allows 0 MiB: one layer's weights, one sample .*", least
    )
    assert not any("--memory" in one for one in again.messages), "what is free was never promised"
    for folder in ("build", "told"):
        assert (tmp_path / folder / "scores.safetensors").read_bytes() == (
            whole.folder / "scores.safetensors"
        ).read_bytes()


def test_scores_are_taken_over_also_by_a_spec_that_narrows_other_axes(foundry: Foundry, scored: Build) -> None:
    """All axes are scored at once, whatever a spec asks for."""
    before = (scored.folder / "scores.safetensors").read_bytes()
    assert "calibrate" not in again(foundry, scored)
    assert "calibrate" not in again(foundry, scored, {"hidden_size": 24, "num_hidden_layers": 1})
    assert (scored.folder / "scores.safetensors").read_bytes() == before


def other_corpus(scored: Build) -> None:
    (scored.folder.parent / "mine.txt").write_text(text(60, seed=1))


def other_weights(scored: Build) -> None:
    """The same shapes under the same name: only the file is another one."""
    from tests.models import save_teacher, tiny_config

    save_teacher(scored.teacher, tiny_config("llama", num_hidden_layers=2), seed=1)


def other_configuration(scored: Build) -> None:
    path = scored.teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def damaged_scores(scored: Build) -> None:
    (scored.folder / "scores.safetensors").write_bytes(b"damaged")


def one_bit(scored: Build) -> None:
    """One bit of one score: the file is still a file of scores."""
    path = scored.folder / "scores.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def no_number(scored: Build) -> None:
    """Scores that are none, with the key of the right ones."""
    path = scored.folder / "scores.safetensors"
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path, metadata)


@pytest.mark.parametrize(
    "change", [other_corpus, other_weights, other_configuration, damaged_scores, one_bit, no_number]
)
def test_scores_of_something_else_are_made_anew(foundry: Foundry, scored: Build, change: Any) -> None:
    change(scored)
    assert "calibrate" in again(foundry, scored)


@pytest.mark.parametrize(
    "importance",
    [{"width": {"batch": "mean"}}, {"width": {"sequence": "var"}}, {"depth": {"metric": "loss"}}],
)
def test_scores_of_other_settings_are_made_anew(foundry: Foundry, scored: Build, importance: Any) -> None:
    assert "calibrate" in again(foundry, scored, **importance)


def test_removal_scores_are_made_once_a_spec_needs_them(foundry: Foundry, scored: Build) -> None:
    loss = {"depth": {"metric": "loss"}}
    assert "rank layers" not in again(foundry, scored, **loss)
    assert "rank layers" in again(foundry, scored, {"num_hidden_layers": 1}, **loss)
    assert "calibrate" not in again(foundry, scored, {"num_hidden_layers": 1}, **loss)


def test_fewer_samples_than_asked_for_are_said(foundry: Foundry, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(text(10))
    data = foundry.calibration | {"text": [str(tmp_path / "short.txt")]}
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), FFN, importance={"data": data})
    words = Words()
    foundry.compile(loaded, tmp_path / "build", words, program=False)
    assert any(
        word.startswith("the calibration data makes ") and word.endswith(" samples, not 6") for word in words.messages
    )


# -- a build that somebody trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [["train/metrics.jsonl"], ["model/config.json"]])
def test_the_training_of_another_student_is_not_overwritten(
    foundry: Foundry, scored: Build, trained: Sequence[str]
) -> None:
    for name in trained:
        (scored.folder / name).parent.mkdir()
        (scored.folder / name).write_text("{}")
    before = digests(scored.folder)
    with pytest.raises(UsageError, match=r"holds the training of another student.*name another folder with -o"):
        again(foundry, scored, {"intermediate_size": 32})
    assert digests(scored.folder) == before
    again(foundry, scored)  # the same student: nothing stands against it


def test_a_selection_may_be_given(foundry: Foundry, tmp_path: Path) -> None:
    """For experiments that choose otherwise than by scores."""
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    chosen = {layer: np.arange(16, 40) for layer in (0, 1)}
    selection = Selection((0, 1), widths={"intermediate_size": chosen})
    build = foundry.compile(foundry.load(teacher, FFN), tmp_path, program=False, selection=selection)
    assert build.document("plan.json")["selection"]["intermediate_size"] == [list(range(16, 40))] * 2
    assert not (tmp_path / "scores.safetensors").exists()
    assert torch.equal(
        build.tensors["model.layers.1.mlp.down_proj.weight"],
        teacher_model(build.plan).model.layers[1].mlp.down_proj.weight.detach()[:, 16:],
    )


def test_files_may_be_read_by_whoever_the_umask_allows(foundry: Foundry, tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read."""
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), FFN)
    old = os.umask(0o022)
    try:
        foundry.compile(loaded, tmp_path / "build")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "build").rglob("*")}
    assert modes.pop("student") == 0o755
    assert set(modes.values()) == {0o644}, modes


def test_two_at_once_in_one_folder_are_refused(foundry: Foundry, tmp_path: Path) -> None:
    loaded = foundry.load(foundry.teacher("llama"), {"layers": {"drop": [1]}}, importance=None)
    refused = pytest.raises(
        UsageError, match=r"another process is compiling \(.*\) in .*; wait for it or stop it first"
    )
    with only_one(tmp_path, "compiling"), refused:
        compile_spec(loaded, tmp_path, device="cpu", progress=Silent())
    assert {path.name for path in tmp_path.iterdir()} == {MARKER, LOCK}
