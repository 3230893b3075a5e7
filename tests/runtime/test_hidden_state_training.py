"""Training on hidden states: which are compared, what becomes of the projection, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.runtime.hidden_states import EMBEDDING, PROJECTION, Recorder
from minitron.runtime.models import LanguageModel
from minitron.specs.errors import SpecInvalid, WorkError
from minitron.specs.training_plan import HeadPlan
from tests.runtime import tiny
from tests.runtime.test_training import interrupted, losses, run, weights

HIDDEN: dict[str, Any] = {"loss__hidden_states": {"pairs": "last:last", "distance": "cosine"}}


def test_states_are_those_that_transformers_itself_reports() -> None:
    """hidden_states[0] is what the first layer is given, and [n + 1] what layer n yields: the last one behind the norm."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(tiny.llama(16)).eval()
    model = LanguageModel(module, HeadPlan.model_validate(tiny.HEAD), "model.layers")
    recorder = Recorder(model, [0, 1], embedding=True)
    ids = torch.arange(6).unsqueeze(0)
    with recorder.recording() as states:
        model.hidden_states(ids)
    reported = module.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[EMBEDDING], reported[0]) and torch.equal(states[0], reported[1])
    assert torch.equal(module.model.norm(states[1]), reported[2])
    with recorder.recording() as later:
        pass
    assert later == {}  # nothing is kept between two forwards


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_states_come_closer(build: Path, distance: str) -> None:
    lines = run(
        build, tokens=64 * 30, optimizer__lr=1e-2, loss__hidden_states={"distance": distance, "pairs": [[1, 1], [0, 0]]}
    )
    assert lines[-1]["hidden_states"] < 0.7 * lines[0]["hidden_states"]
    assert lines[-1]["forward_kl"] < 0.7 * lines[0]["forward_kl"]
    # The dynamic weight makes the two terms equal.
    assert all(line["loss"] == pytest.approx(2 * line["forward_kl"], rel=1e-5) for line in lines)


def test_the_projection_is_saved_on_the_way_and_not_in_the_model(build: Path) -> None:
    run(build, **HIDDEN)
    (*_, last) = sorted((build / "train" / "checkpoints").glob("step-*/model.safetensors"))
    assert load_file(last)[f"{PROJECTION}.weight"].shape == (24, 16)
    assert weights(build).keys() == load_file(build / "student" / "model.safetensors").keys()


def test_equal_widths_need_no_projection(tmp_path: Path) -> None:
    build = tiny.make_build(tmp_path, teacher=tiny.llama(16), **HIDDEN)
    run(build)
    assert not any(
        PROJECTION in name
        for path in (build / "train" / "checkpoints").glob("step-*/*.safetensors")
        for name in load_file(path)
    )


def goes_on_bit_for_bit(build: Path, tmp_path: Path) -> None:
    """Checks that a training which is interrupted ends with the weights of one that is not."""
    shutil.copytree(tmp_path / "here", tmp_path / "whole")
    whole = run(tmp_path / "whole" / "build")
    interrupted(build, 5)
    assert run(build) == whole
    assert all(torch.equal(w, weights(tmp_path / "whole" / "build")[name]) for name, w in weights(build).items())


def test_interrupted_it_goes_on_bit_for_bit(build: Path, tmp_path: Path) -> None:
    tiny.write_plan(build, **HIDDEN)
    goes_on_bit_for_bit(build, tmp_path)


def test_neither_the_cut_nor_recomputing_activations_changes_anything(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    one = losses(build, micro_batch_size=4, **HIDDEN)
    other = losses(tmp_path / "there" / "build", micro_batch_size=1, gradient_checkpointing=True, **HIDDEN)
    assert one == pytest.approx(other, rel=1e-5)


def test_states_alone_can_be_learnt(build: Path) -> None:
    lines = run(build, loss={"logits": {"weight": 0}, "hidden_states": {"weight": 0.5, "embedding": False}})
    assert all(line["loss"] == pytest.approx(0.5 * line["hidden_states"], rel=1e-6) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss__hidden_states": {"pairs": [[0, 0], [2, 1]]}},
            r"loss\.hidden_states\.pairs\.1\.0: the teacher has 2 layers, and no layer 2; write at most 1: layers",
        ),
        ({"loss__hidden_states": {"pairs": [[0, 7]]}}, r"pairs\.0\.1: the student has 2 layers, and no layer 7"),
        (HIDDEN | {"student__layers": "model.blocks"}, r"student\.layers: the model has no list of layers `model\.bl"),
        (HIDDEN | {"teacher__layers": None}, r"teacher\.layers: is not there, and `loss\.hidden_states` needs it"),
    ],
)
def test_layers_that_are_not_there(build: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecInvalid, match=message):
        run(build, **changes)


# -- kept coordinates ---------------------------------------------------------------------------------------------------

KEPT: dict[str, Any] = {"loss__hidden_states": {"coordinates": "kept"}, "kept_coordinates": "coordinates.safetensors"}


@pytest.fixture
def reduced(build: Path) -> Path:
    """A build whose student keeps 16 of the teacher's 24 channels."""
    save_file({"index": torch.arange(16)}, build / "coordinates.safetensors")
    return build


def test_the_weight_falls_to_nothing(reduced: Path) -> None:
    lines = run(reduced, **KEPT)
    for line in lines:
        weight = 10.0 * (1 - (line["step"] - 1) / len(lines))
        assert line["loss"] == pytest.approx(line["forward_kl"] + weight * line["hidden_states"], rel=1e-5)
    assert lines[0]["hidden_states"] > 0.5 and lines[-1]["hidden_states"] < lines[0]["hidden_states"]
    assert not any(PROJECTION in name for name in weights(reduced))


@pytest.mark.parametrize("coordinates", [None, "index", "matrix"])
def test_a_student_that_is_its_teacher_has_nothing_to_align(tmp_path: Path, coordinates: str | None) -> None:
    """With nothing narrowed the term is zero at the start, whichever way all coordinates are kept."""
    build = tiny.make_build(tmp_path, teacher=tiny.llama(16), **KEPT)
    shutil.copy(tmp_path / "teacher" / "model.safetensors", build / "student" / "model.safetensors")
    tiny.verify(build)
    if coordinates is None:
        tiny.write_plan(build, loss__hidden_states=KEPT["loss__hidden_states"])
    else:
        whole = {"index": torch.arange(16), "matrix": torch.eye(16)}[coordinates]
        save_file({coordinates: whole}, build / "coordinates.safetensors")
    line = run(build)[0]
    assert line["hidden_states"] < 1e-10 and line["forward_kl"] < 1e-6


def test_kept_coordinates_are_the_teachers(reduced: Path) -> None:
    """A mixing matrix gives another term than the channels, from the same models."""

    def first(kept: torch.Tensor) -> float:
        for name in ("train", "model"):
            shutil.rmtree(reduced / name, ignore_errors=True)
        save_file({"matrix" if kept.dim() == 2 else "index": kept.contiguous()}, reduced / "coordinates.safetensors")
        return float(run(reduced, **KEPT)[0]["hidden_states"])

    channels = first(torch.arange(16))
    assert first(torch.eye(24)[:, :16]) == pytest.approx(channels, rel=1e-6)
    assert first(torch.eye(24)[:, 8:]) != pytest.approx(channels, rel=1e-3)


def test_interrupted_with_a_falling_weight(reduced: Path, tmp_path: Path) -> None:
    tiny.write_plan(reduced, **KEPT)
    goes_on_bit_for_bit(reduced, tmp_path)


def test_other_coordinates_are_another_training(reduced: Path) -> None:
    tiny.write_plan(reduced, **KEPT)
    interrupted(reduced, 5)
    save_file({"index": torch.arange(8, 24)}, reduced / "coordinates.safetensors")
    with pytest.raises(
        SpecInvalid, match=r"kept_coordinates: what the student keeps of the teacher's hidden states cha"
    ):
        run(reduced)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, r"kept_coordinates: there is no file .*coordinates\.safetensors; compile again"),
        (
            {"index": torch.arange(15)},
            r"kept_coordinates: does not lead from the teacher's 24 channels to the student's 16",
        ),
        ({"index": torch.arange(16) + 16}, r"does not lead from the teacher's 24 channels"),
        ({"matrix": torch.eye(16)}, r"does not lead from the teacher's 24 channels"),
    ],
)
def test_coordinates_that_do_not_fit(build: Path, tensors: dict[str, Any] | None, message: str) -> None:
    if tensors is not None:
        save_file(tensors, build / "coordinates.safetensors")
    with pytest.raises(SpecInvalid, match=message):
        run(build, **KEPT)


def test_a_file_that_holds_something_else(build: Path) -> None:
    save_file({"channels": torch.arange(16)}, build / "coordinates.safetensors")
    with pytest.raises(WorkError, match=r"holds \['channels'\] instead of `index` or `matrix`; compile again"):
        run(build, **KEPT)
    (build / "coordinates.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WorkError, match=r"coordinates\.safetensors could not be read \(.*\); compile again"):
        run(build)


def test_a_narrower_student_needs_them(build: Path) -> None:
    message = (
        r"kept_coordinates: is not there, and `coordinates: kept` needs it: the widths are 24 and 16; compile again, or"
    )
    with pytest.raises(SpecInvalid, match=message):
        run(build, loss__hidden_states={"coordinates": "kept"})


def test_all_layers_of_models_of_other_depths(tmp_path: Path) -> None:
    shallow = tiny.llama(16)
    shallow.num_hidden_layers = 1
    build = tiny.make_build(tmp_path, student=shallow)
    message = (
        r"pairs: `all` does not say which of the teacher's 2 layers the student's 1 were cut from; compile again, or l"
    )
    with pytest.raises(SpecInvalid, match=message):
        run(build, loss__hidden_states={"pairs": "all"})
