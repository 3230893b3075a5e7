"""`distill.loss.hidden_states.coordinates: kept`: what the compiler writes for it is what the student keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from minitron.compiler.recovery.rotated_weights import RotatedWeights
from minitron.compiler.verify_build import verify_build
from minitron.compiler.weights.source import open_weights
from minitron.runtime import train
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from tests.foundry import Build, Foundry, load_model, teacher_model, token_ids

NARROW = {"hidden_size": 24, "num_hidden_layers": 1}


def aligned(foundry: Foundry, student: dict[str, Any], family: str = "llama", **importance: Any) -> Build:
    distill = {
        "data": {"text": [str(foundry.root / "corpus.txt")], "document": "line"},
        "tokens": 128, "sequence_length": 16, "global_batch_size": 2, "loss": {"hidden_states": {"coordinates": "kept"}},
    }  # fmt: skip
    importance = {"data": foundry.calibration, **importance}
    teacher = foundry.teacher(family, num_hidden_layers=2)
    return foundry.build(teacher, student, program=False, importance=importance, distill=distill)


def training(build: Build) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((build.folder / "training.yaml").read_text(encoding="utf-8"))
    return document


def kept_of(build: Build, states: torch.Tensor) -> torch.Tensor:
    """The teacher's states in the coordinates of the build's file."""
    tensors = load_file(build.folder / "coordinates.safetensors")
    return states[..., tensors["index"]] if "index" in tensors else states @ tensors["matrix"]


@pytest.mark.parametrize(
    "importance", [{}, {"hidden_basis": "principal"}, {"hidden_basis": "principal", "untie": True}], ids=str
)
def test_the_students_embedding_is_what_it_keeps_of_the_teachers(foundry: Foundry, importance: dict[str, Any]) -> None:
    """The input of the first layer, which no narrowed layer has changed. (A tied matrix that is fitted is near it.)"""
    family = "qwen3" if importance.get("untie") else "llama"
    build = aligned(foundry, NARROW, family, **importance)
    ids = token_ids()
    wanted = kept_of(build, teacher_model(build.plan).get_input_embeddings()(ids))
    torch.testing.assert_close(load_model(build.folder / "student").get_input_embeddings()(ids), wanted)


def test_the_plan_names_the_file_and_the_pairs_of_kept_layers(foundry: Foundry) -> None:
    build = aligned(foundry, NARROW, depth={"metric": "block_influence"})
    plan = training(build)
    (kept,) = build.document("plan.json")["selection"]["num_hidden_layers"]
    assert plan["loss"]["hidden_states"]["pairs"] == [[kept[0], 0]]
    assert plan["kept_coordinates"] == "coordinates.safetensors"
    (index,) = build.document("plan.json")["selection"]["hidden_size"]
    assert load_file(build.folder / "coordinates.safetensors")["index"].tolist() == index


def test_a_student_that_keeps_all_channels_needs_no_file(foundry: Foundry) -> None:
    build = aligned(foundry, {"intermediate_size": 24})
    assert training(build)["kept_coordinates"] is None
    assert training(build)["loss"]["hidden_states"]["pairs"] == [[0, 0], [1, 1]]
    assert not (build.folder / "coordinates.safetensors").exists()


def test_every_layer_of_the_rotated_teacher_yields_the_coordinates(foundry: Foundry, tmp_path: Path) -> None:
    """With nothing narrowed the term is zero: whole, the rotated teacher's states are the teacher's in the file's basis."""
    build = aligned(foundry, NARROW, hidden_basis="principal")
    plan = build.plan
    assert plan.rotation is not None
    teacher = teacher_model(plan)
    source = open_weights(plan.teacher.captured, plan.checkpoint)
    matrix = load_file(build.folder / "coordinates.safetensors")["matrix"]
    whole = torch.linalg.qr(torch.cat([matrix, torch.eye(32)], 1).double())[0][:, :32]
    whole[:, :24] = matrix
    rotated = RotatedWeights(source, plan.rotation, whole)
    ids = token_ids()
    with torch.no_grad():
        states = teacher(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        for name, parameter in teacher.named_parameters():
            parameter.copy_(rotated.get(name))
        turned = teacher(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    for before, after in zip(states, turned, strict=True):
        torch.testing.assert_close(after[..., :24], before @ matrix, rtol=1e-4, atol=1e-4)


def test_the_runtime_trains_on_what_the_compiler_writes(foundry: Foundry, tmp_path: Path) -> None:
    build = aligned(foundry, NARROW, hidden_basis="principal")
    folder = tmp_path / "build"
    shutil.copytree(build.folder, folder)
    document = yaml.safe_load((folder / "training.yaml").read_text())
    document["teacher"]["model"] = str(build.teacher)
    (folder / "training.yaml").write_text(yaml.safe_dump(document))
    train(folder, device="cpu", progress=Silent())
    assert (folder / "model" / "config.json").exists()


def test_verify_sees_other_coordinates(foundry: Foundry, tmp_path: Path) -> None:
    loaded = aligned(foundry, NARROW).loaded
    build = foundry.compile(loaded, tmp_path / "build")
    path = build.folder / "coordinates.safetensors"
    with foundry.shortened():
        verify_build(build.folder, device="cpu", progress=Silent())
        assert build.document("verification.json")["checks"][3]["name"] == "coordinates"
        save_file({"index": load_file(path)["index"].flip(0)}, path)
        with pytest.raises(WorkError, match=r"`coordinates`: coordinates\.safetensors is not what the student keeps"):
            verify_build(build.folder, device="cpu", progress=Silent())
