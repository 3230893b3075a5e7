"""`teacher.tower: language_model`: the language tower of a multimodal model is narrowed, and the whole model written back.

Real multimodal checkpoints, tiny, every weight drawn: a vision tower, a projector, a language tower.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from minitron.compiler import Plan, compile_spec, export_whole, make_plan, verify_build
from minitron.compiler.capture.models import quiet
from minitron.compiler.storage import shards
from minitron.compiler.towers import whole_on_disk
from minitron.specs import load_spec
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.progress import Silent
from minitron.specs.weight_files import read_headers
from tests import models
from tests.foundry import WITHOUT_PROGRAM

TEXT = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64, "query_pre_attn_scalar": 8, "sliding_window": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 12,
    "image_size": 28, "patch_size": 14, "num_channels": 3, "vision_output_dim": 24, "projector_input_dim": 24,
    "projector_output_dim": 24,
}  # fmt: skip
WHOLE = {"gemma3": {"mm_tokens_per_image": 4, "image_token_index": 95}, "llava": {"image_token_index": 95}}
CALIBRATION = {"text": ["text.txt"], "document": "line", "samples": 6, "sequence_length": 48}


def multimodal(folder: Path, family: str) -> Any:
    """A tiny multimodal model with a tokenizer, saved; also what it answers."""
    default = AutoConfig.for_model(family)
    parts = {
        name: {"model_type": getattr(default, name).model_type}
        | {key: value for key, value in keys.items() if hasattr(getattr(default, name), key)}
        for name, keys in (("text_config", TEXT), ("vision_config", VISION))
    }
    config = AutoConfig.for_model(family, **parts, **WHOLE.get(family, {}))
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
        model.save_pretrained(folder)
    models.save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}\n')
    return model


def spec(root: Path, student: dict[str, Any], **more: Any) -> Any:
    (root / "text.txt").write_text(models.text(60), encoding="utf-8")
    document = {
        "apiVersion": "minitron/v1", "kind": "Compression", "name": "tower",
        "teacher": {"model": "teacher", "tower": "language_model"}, "student": student, "importance": {"data": CALIBRATION},
    } | more  # fmt: skip
    (root / "spec.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_spec(root / "spec.yaml")


def compiled(root: Path, student: dict[str, Any], **more: Any) -> Plan:
    return compile_spec(
        spec(root, student, **more), root / "build", device="cpu", progress=Silent(), stages=WITHOUT_PROGRAM
    )


def refusals(root: Path, student: dict[str, Any], **more: Any) -> list[str]:
    with pytest.raises(SpecInvalid) as caught:
        make_plan(spec(root, student, **more), build=root / "build")
    return [f"{one.path}: {one.message}" for one in caught.value.errors]


def whole(folder: Path) -> Any:
    with quiet():
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3", "llama4"])
def test_the_whole_model_answers_as_its_narrower_tower_and_sees_as_before(tmp_path: Path, family: str) -> None:
    teacher = multimodal(tmp_path / "teacher", family)
    drop = {} if family == "llama4" else {"layers": {"drop": [1]}}
    widths: dict[str, Any] = {"num_key_value_heads": 1, "num_attention_heads": 2} | drop
    if family != "llama4":
        widths["intermediate_size"] = 24
    compiled(tmp_path, widths)
    written = whole(export_whole(tmp_path / "build", None, progress=Silent()))
    assert written.config.text_config.num_attention_heads == 2
    before, after = tensors(tmp_path / "teacher"), tensors(tmp_path / "build" / "whole")
    others = [name for name in before if "language_model" not in name and not name.startswith("lm_head")]
    assert others and all(torch.equal(before[name], after[name]) for name in others), (
        "towers and projector keep their bytes"
    )
    assert (tmp_path / "build" / "whole" / "preprocessor_config.json").is_file()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "build" / "student", attn_implementation="eager").eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.allclose(written(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(written(input_ids=ids).logits, teacher(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_a_projector_that_ends_in_one_matrix_loses_the_dropped_channels(tmp_path: Path, family: str) -> None:
    teacher = multimodal(tmp_path / "teacher", family)
    compiled(tmp_path, {"hidden_size": 24})
    written = whole(export_whole(tmp_path / "build", tmp_path / "out", progress=Silent()))
    kept = json.loads((tmp_path / "build" / "plan.json").read_text())["selection"]["hidden_size"][0]
    assert kept != list(range(24))
    projectors = [
        next(m for name, m in one.named_modules() if name.endswith("projector")) for one in (teacher, written)
    ]
    seen = [parameter for parameter in projectors[0].parameters() if 32 in parameter.shape]
    assert len(seen) == 1
    features = torch.randn(2, 4, 24)
    with torch.no_grad():
        old, new = (projector(features) for projector in projectors)
    assert torch.allclose(old[..., kept], new, atol=1e-6), "an image adds the same to the kept channels"


def test_a_build_of_a_tower_is_verified_and_goes_on_where_it_was(tmp_path: Path) -> None:
    multimodal(tmp_path / "teacher", "gemma3")
    compiled(tmp_path, {"intermediate_size": 24})
    tower = tmp_path / "build" / "tower" / "model.safetensors"
    first = tower.stat().st_mtime_ns
    compiled(tmp_path, {"intermediate_size": 24})
    assert tower.stat().st_mtime_ns == first, "a tower made from the same files is not written again"
    tower.write_bytes(tower.read_bytes()[:-4] + b"\0\0\0\1")
    compiled(tmp_path, {"intermediate_size": 24})
    text = tensors(tmp_path / "build" / "tower")
    stored = tensors(tmp_path / "teacher")
    assert all(
        torch.equal(text[name], stored[f"language_{name}".replace("language_", "language_model.", 1)]) for name in text
    )


def test_a_projector_with_the_width_inside_keeps_hidden_size(tmp_path: Path) -> None:
    multimodal(tmp_path / "teacher", "llava")
    (message,) = refusals(tmp_path, {"hidden_size": 24})
    assert message.startswith("student.hidden_size: hidden_size cannot change: ")
    assert "multi_modal_projector.linear_1" in message and "the projector computes with it" in message


def test_a_width_that_another_tower_fixes(tmp_path: Path) -> None:
    multimodal(tmp_path / "teacher", "paligemma")
    (message,) = refusals(tmp_path, {"hidden_size": 24})
    assert "another key of the paligemma configuration fixes it" in message


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        (
            "llava",
            {"importance": {"hidden_basis": "principal", "data": CALIBRATION}},
            "writes into the residual stream",
        ),
        ("gemma3", {"importance": {"untie": True, "data": CALIBRATION}}, "one matrix for embedding and head"),
    ],
)
def test_what_does_not_go_with_other_towers(tmp_path: Path, family: str, more: dict[str, Any], message: str) -> None:
    multimodal(tmp_path / "teacher", family)
    assert any(message in one for one in refusals(tmp_path, {"hidden_size": 24}, **more))


def test_a_model_of_one_tower(tmp_path: Path) -> None:
    models.save_teacher(tmp_path / "teacher", models.tiny_config("llama"))
    (message,) = refusals(tmp_path, {"intermediate_size": 24})
    assert message == f"teacher.tower: {'teacher'} is a llama model of one tower"


def test_several_towers_without_the_word(tmp_path: Path) -> None:
    multimodal(tmp_path / "teacher", "gemma3")
    loaded = spec(tmp_path, {"intermediate_size": 24}, teacher={"model": "teacher"})
    with pytest.raises(SpecInvalid, match="write `tower: language_model` under `teacher`"):
        make_plan(loaded, build=tmp_path / "build")


def test_export_of_what_is_whole_already(tmp_path: Path) -> None:
    models.save_teacher(tmp_path / "teacher", models.tiny_config("llama"))
    compiled(tmp_path, {"intermediate_size": 24}, teacher={"model": "teacher"})
    with pytest.raises(UsageError, match="is a model of one tower"):
        export_whole(tmp_path / "build", None, progress=Silent())


def test_verify_makes_a_lost_tower_again(tmp_path: Path) -> None:
    multimodal(tmp_path / "teacher", "gemma3")
    compile_spec(spec(tmp_path, {"intermediate_size": 24}), tmp_path / "build", device="cpu", progress=Silent())
    shutil.rmtree(tmp_path / "build" / "tower")
    verify_build(tmp_path / "build", device="cpu", progress=Silent())
    assert (tmp_path / "build" / "tower" / "config.json").is_file()


def test_a_tower_larger_than_a_shard_is_written_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multimodal(tmp_path / "teacher", "gemma3")
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    compiled(tmp_path, {"intermediate_size": 24})
    index = json.loads((tmp_path / "build" / "tower" / "model.safetensors.index.json").read_text())
    text = tensors(tmp_path / "build" / "tower")
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == text.keys()
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in text.values())
    stored = tensors(tmp_path / "teacher")
    assert all(torch.equal(text[name], stored[f"language_model.{name}"]) for name in text)


def test_a_whole_model_whose_file_changes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multimodal(tmp_path / "teacher", "gemma3")
    compiled(tmp_path, {"hidden_size": 24})
    weights = tmp_path / "teacher" / "model.safetensors"

    def another(*arguments: Any) -> dict[str, Any]:
        weights.touch()
        return read_headers(*arguments)

    monkeypatch.setattr(whole_on_disk, "read_headers", another)
    with pytest.raises(WorkError, match=r"model\.safetensors changed while it was in use; let it rest and run"):
        export_whole(tmp_path / "build", None, progress=Silent())
    assert not (tmp_path / "build" / "whole").exists()
