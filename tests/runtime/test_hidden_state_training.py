"""Training on hidden states: which are compared, what becomes of the projection, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron.runtime.hidden_states import EMBEDDING, PROJECTION, Recorder
from minitron.runtime.models import LanguageModel
from minitron.specs.errors import SpecInvalid
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


def test_interrupted_it_goes_on_bit_for_bit(build: Path, tmp_path: Path) -> None:
    tiny.write_plan(build, **HIDDEN)
    shutil.copytree(tmp_path / "here", tmp_path / "whole")
    whole = run(tmp_path / "whole" / "build")
    interrupted(build, 5)
    assert run(build) == whole
    assert all(torch.equal(w, weights(tmp_path / "whole" / "build")[name]) for name, w in weights(build).items())


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
