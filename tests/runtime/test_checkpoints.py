"""Checkpoints are whole or not at all; what cannot be read is passed over; a full disk costs nothing but the new one."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from minitron.runtime import checkpoint
from minitron.runtime.checkpoint import Checkpoints, TrainerState, load
from minitron.runtime.optimizer import make_optimizer
from minitron.runtime.pieces import Piece, PieceFiles, model_pieces, optimizer_pieces, piece_of
from minitron.runtime.saving import Saver
from minitron.runtime.world import World
from minitron.specs.blocks.training import Optimizer
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from tests.runtime import tiny
from tests.runtime.listening import Messages

ALONE = World(0, 1, torch.device("cpu"))


class Trainee:
    """A model with tied weights and an optimizer, trained on noise."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: Any = AutoModelForCausalLM.from_config(tiny.llama(8, tied=True))
        self.optimizer = make_optimizer(self.model, Optimizer(lr=1e-2))

    def step(self) -> None:
        self.model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def pieces(self) -> dict[str, dict[str, Piece]]:
        return {"model": model_pieces(self.model), "optimizer": optimizer_pieces(self.model, self.optimizer)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def save(checkpoints: Checkpoints, step: int, trainee: Trainee | None = None, loss: float | None = None) -> None:
    trainee, saver = trainee or Trainee(), Saver(checkpoints, {"seed": 0}, ALONE, spread=False)
    saver.start(TrainerState(step, 4 * step, 64 * step), trainee.pieces(), loss)
    saver.finish()


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    one, checkpoints = Trainee(), Checkpoints(tmp_path, keep=2)
    one.step()
    save(checkpoints, 1, one)
    one.step()
    other = Trainee(seed=1)
    newest = checkpoints.newest(Silent(), ALONE)
    assert newest is not None and newest.state == TrainerState(1, 4, 64) and newest.identity == {"seed": 0}
    load(newest, other.model, other.optimizer)
    other.step()
    assert all(torch.equal(weight, other.weights()[name]) for name, weight in one.weights().items())


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 12):
        save(checkpoints, step)
    assert [folder.name for folder in checkpoints.names()] == ["step-00000012", "step-00000005"]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=2).newest(Silent(), ALONE) is None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_one_is_put_aside_for_the_one_before(tmp_path: Path, name: str, damage: Any) -> None:
    checkpoints, progress = Checkpoints(tmp_path, keep=2), Messages()
    save(checkpoints, 1)
    save(checkpoints, 2)
    damage(tmp_path / "step-00000002" / name)
    newest = checkpoints.newest(progress, ALONE)
    assert newest is not None and newest.state.step == 1
    assert len(progress.texts) == 1 and "step-00000002 is damaged" in progress.texts[0]
    assert (tmp_path / "damaged-step-00000002").is_dir()
    save(checkpoints, 2)
    again = checkpoints.newest(Silent(), ALONE)
    assert again is not None and again.state.step == 2


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    checkpoints, progress = Checkpoints(tmp_path, keep=2), Messages()
    save(checkpoints, 1)
    save(checkpoints, 2)
    flip(tmp_path / "step-00000002" / "model.safetensors")
    newest = checkpoints.newest(progress, ALONE)
    assert newest is not None and newest.state.step == 1
    assert "model.safetensors is not what was written" in progress.texts[0]


def test_when_all_are_damaged_nothing_is_begun_anew_unasked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    cut(tmp_path / "step-00000001" / "model.safetensors")
    message = (
        r"every checkpoint in .* is damaged \(step-00000001: model\.safetensors is not what was written\); delete that"
    )
    with pytest.raises(WorkError, match=message):
        checkpoints.newest(Silent(), ALONE)
    with pytest.raises(WorkError, match=r"every checkpoint in .* is damaged"):
        checkpoints.newest(Silent(), ALONE)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_keeps_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    real = checkpoint.save_file

    def full(tensors: Any, path: Path, *more: Any) -> None:
        if path.name == "optimizer.safetensors":
            raise failure
        real(tensors, path, *more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WorkError, match=r"the disk is full; the last good one, .*step-00000001, was kept\. Make room"):
        save(checkpoints, 2)
    monkeypatch.undo()
    newest = checkpoints.newest(Silent(), ALONE)
    assert newest is not None and newest.state.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "what was half written is gone"


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    shutil.copytree(tmp_path / "step-00000001", checkpoints.unfinished(TrainerState(2, 8, 128)))
    newest = checkpoints.newest(Silent(), ALONE)
    assert newest is not None and newest.state.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    other: Any = AutoModelForCausalLM.from_config(tiny.llama(16, tied=True))
    newest = checkpoints.newest(Silent(), ALONE)
    assert newest is not None
    with pytest.raises(WorkError, match="it is of another model"):
        load(newest, other, make_optimizer(other, Optimizer()))


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    checkpoints, progress = Checkpoints(tmp_path, keep=2), Messages()
    save(checkpoints, 1)
    save(checkpoints, 2)
    state = tmp_path / "step-00000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format_version": 99}))
    newest = checkpoints.newest(progress, ALONE)
    assert newest is not None and newest.state.step == 1
    assert "its format is 99" in progress.texts[0]


def reads_as(change: Any) -> Any:
    """Damage that leaves a document which reads well."""

    def damage(file: Path) -> None:
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document, indent=1))

    return damage


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step=3),
        lambda state: state.update(samples=12),
        lambda state: state.update(tokens=129),
        lambda state: state.update(parts=0),
        lambda state: state["identity"].update(seed=1),
        lambda state: state["files"].clear(),
        lambda state: state["files"].pop("optimizer.safetensors"),
        lambda state: state.update(held_out_loss=0.1),
        lambda state: state.pop("crc32"),
    ],
)
def test_a_state_that_reads_well_and_is_not_what_was_written(tmp_path: Path, change: Any) -> None:
    """One flipped bit in it would train another model, or blame the user's plan."""
    checkpoints, progress = Checkpoints(tmp_path, keep=2), Messages()
    save(checkpoints, 1)
    save(checkpoints, 2)
    reads_as(change)(tmp_path / "step-00000002" / "state.json")
    newest = checkpoints.newest(progress, ALONE)
    assert newest is not None and newest.state == TrainerState(1, 4, 64) and newest.identity == {"seed": 0}
    assert "step-00000002 is damaged" in progress.texts[0]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_of_a_state_goes_unseen(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=2)
        state = TrainerState(1, 4, 64)
        checkpoints.write_part(state, 0, 1, {"model": {"w": piece_of(torch.ones(2))}, "optimizer": {}})
        checkpoints.publish(state, 1, {"seed": 0, "optimizer.lr": 1e-4, "fingerprint": "0123"}, 2.5)
        file = Path(folder) / "step-00000001" / "state.json"
        content = bytearray(file.read_bytes())
        before = json.loads(content)
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        try:
            newest = checkpoints.newest(Silent(), ALONE)
        except WorkError:
            return
        assert newest is not None and newest.state == state, "what changed were spaces"
        assert dict(newest.identity) == before["identity"] and newest.parts == 1


def test_a_checkpoint_under_the_name_of_another_step(tmp_path: Path) -> None:
    checkpoints, progress = Checkpoints(tmp_path, keep=2), Messages()
    save(checkpoints, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    newest = checkpoints.newest(progress, ALONE)
    assert newest is not None and newest.state.step == 1
    assert "step-00000009 is damaged (it is of step 1)" in progress.texts[0]


def test_the_best_one_is_kept_as_well(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
    for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5), (5, 2.0), (6, 2.1)):
        save(checkpoints, step, loss=loss)
        best = {1: 1, 2: 2, 3: 2, 4: 2}.get(step, 5)
        assert {folder.name for folder in checkpoints.names()} == {f"step-{n:08d}" for n in (best, step)}
    save(checkpoints, 7, loss=1.0)
    save(checkpoints, 8, loss=float("nan"))
    assert [folder.name for folder in checkpoints.names()] == ["step-00000008", "step-00000007"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is what was there when saving began, whatever the next steps do to it."""
    checkpoints, trainee, released = Checkpoints(tmp_path, keep=2), Trainee(), threading.Event()
    real = checkpoint.save_file

    def slow(*args: Any) -> None:
        released.wait(10)
        real(*args)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    trainee.step()
    before = trainee.weights()
    saver = Saver(checkpoints, {"seed": 0}, ALONE, spread=False)
    saver.start(TrainerState(1, 4, 64), trainee.pieces(), None)
    assert saver.status() == (True, False)
    saver.settle(writing=True, failed=False)
    trainee.step()
    assert not checkpoints.names()
    released.set()
    saver.finish()
    newest = checkpoints.newest(Silent(), ALONE)
    assert newest is not None and newest.state.step == 1
    load(newest, trainee.model, trainee.optimizer)
    assert all(torch.equal(weight, before[name]) for name, weight in trainee.weights().items())


def test_an_error_that_is_a_bug_of_ours_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(Checkpoints(tmp_path, keep=1), 1)


def spread(tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, Piece]:
    """The rows of one rank, dealt as torch.chunk does."""
    pieces = {}
    for name, tensor in tensors.items():
        rows = tensor.shape[0] if tensor.ndim else 0
        each = -(-rows // ranks)
        start = min(rank * each, rows)
        pieces[name] = Piece(tensor[start : start + each].clone() if rows else tensor, start, tuple(tensor.shape))
    return pieces


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=3), writers=st.integers(1, 5), readers=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_number_of_ranks_reads_what_any_number_wrote(rows: list[int], writers: int, readers: int) -> None:
    tensors = {f"w{n}": torch.rand(n_rows, 2) for n, n_rows in enumerate(rows)} | {"count": torch.tensor(7.0)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, state = Checkpoints(Path(folder), keep=1), TrainerState(1, 4, 64)
        for part in range(writers):
            pieces = spread(tensors, part, writers)
            checkpoints.write_part(state, part, writers, {"model": pieces, "optimizer": {}})
        checkpoints.publish(state, writers, {}, None)
        newest = checkpoints.newest(Silent(), ALONE)
        assert newest is not None
        with PieceFiles(newest.files("model")) as files:
            assert all(torch.equal(files.whole(name), tensor) for name, tensor in tensors.items())
            for rank in range(readers):
                for name, piece in spread(tensors, rank, readers).items():
                    wanted = piece.tensor.clone()
                    assert files.fill(name, Piece(piece.tensor.zero_(), piece.start, piece.shape))
                    assert torch.equal(piece.tensor, wanted)
                    assert not files.fill(name, Piece(piece.tensor, 0, (10, 2)))


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=1), TrainerState(1, 4, 64)
    for part in (0, 1):
        checkpoints.write_part(state, part, 2, {"model": spread({"w": torch.rand(4, 2)}, part, 2), "optimizer": {}})
    checkpoints.publish(state, 2, {}, None)
    (tmp_path / "step-00000001" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WorkError, match=r"is damaged \(step-00000001: .*\); delete that folder"):
        checkpoints.newest(Silent(), ALONE)
