"""Hostile and half-right checkpoints: each is refused in the plan, by its file and tensor, with what to do; or it works."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from minitron.compiler.capture.models import quiet
from minitron.compiler.teacher.folder_files import copy_tokenizer_and_settings
from minitron.compiler.teacher.freshness import why_stale
from minitron.compiler.teacher.lock import renew
from minitron.compiler.teacher.tokenizer import tokenizer_files
from minitron.compiler.weights.source import check_headers, open_weights
from minitron.specs import load_spec
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.progress import Silent
from minitron.specs.weight_files import SINGLE
from tests.compiler.test_checkpoint import captured, change_config, opened
from tests.foundry import Foundry
from tests.models import save_teacher, tiny_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("whole"), tiny_config("qwen3", num_hidden_layers=2))


@pytest.fixture
def folder(teacher: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(teacher, tmp_path / "teacher"))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def opening(folder: Path) -> Any:
    """What a plan does with the files, then all weights as a compile reads them."""
    checkpoint = opened(folder)
    source = open_weights(captured(checkpoint), checkpoint)
    return {name: source.get(name) for name in set(captured(checkpoint).canonical.values())}


# -- configurations -----------------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deeply nested": (
        lambda f: (f / "config.json").write_text("[" * 100_000 + "]" * 100_000),
        r"config\.json is not valid JSON \(it is nested too deeply\); copy the file again",
    ),
    "too many layers": (
        lambda f: change_config(f, num_hidden_layers=100_000_000),
        r"says that the model has 100000000 layers \(num_hidden_layers\); at most 2000 are possible",
    ),
    "not a number": (
        lambda f: change_config(f, rms_norm_eps=float("nan")),
        r"config\.json: rms_norm_eps is not a number \(NaN\); copy the file again from its source",
    ),
    "too large": (
        lambda f: (f / "config.json").write_text(" " * 10_000_001),
        "config.json is not valid JSON .it is larger than 10000000 bytes",
    ),
    "an adapter alone": (
        lambda f: ((f / SINGLE).unlink(), (f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")),
        r"is an adapter \(adapter_config\.json\) and not a whole model; merge it into its base model",
    ),
    "an adapter beside weights": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
        r"holds an adapter of org/base beside its weights .* or remove the adapter_\* files",
    ),
    "quantised, as ModelOpt says it": (
        lambda f: (f / "hf_quant_config.json").write_text("{}"),
        r"the weights are quantized \(hf_quant_config\.json lies there\); name the checkpoint that they were made from",
    ),
    "quantised, as old GPTQ says it": (
        lambda f: (f / "quantize_config.json").write_text("{}"),
        r"the weights are quantized \(quantize_config\.json lies there\)",
    ),
    "quantised, as old compressed-tensors says it": (
        lambda f: change_config(f, compression_config={"format": "pack-quantized"}),
        r"config\.json: the weights are quantized \(compression_config\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_configurations_that_are_refused_within_seconds(folder: Path, name: str) -> None:
    breaks, words = HOSTILE[name]
    breaks(folder)
    started = time.monotonic()
    with pytest.raises(UsageError, match=words):
        opened(folder, weights=False)
    assert time.monotonic() - started < 20


def test_keys_that_only_change_how_a_model_is_called_are_left_out(folder: Path) -> None:
    """A kernel of the Hub would be code of somebody else; a tuple in place of an output has no logits."""
    keys = {
        "output_attentions": True, "output_hidden_states": True, "return_dict": False, "use_cache": False,
        "attn_implementation": "org/kernel", "torchscript": True, "dtype": "torch.bfloat16",
    }  # fmt: skip
    content = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    config = opened(folder).config
    assert config.dtype == torch.bfloat16 and config.use_cache and config.return_dict
    assert not config.output_attentions and not config.output_hidden_states
    assert "kernel" not in config.to_json_string(use_diff=False)


def test_a_student_of_such_a_teacher_passes_its_checks(foundry: Foundry, folder: Path) -> None:
    change_config(folder, output_attentions=True, return_dict=False, use_cache=False, attn_implementation="org/kernel")
    made = foundry.build(folder, {"intermediate_size": 24}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    assert not {"output_attentions", "return_dict", "attn_implementation"} & made.config.keys()


# -- tensors ------------------------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"


def with_scales(*names: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.to(dtype) if n == DOWN else t for n, t in tensors.items()} | {n: torch.ones(1) for n in names}

    return change


@pytest.mark.parametrize("scale", ["_scale", "_scale_inv", "_scale_2"])
def test_weights_that_a_scale_belongs_to_are_quantised(folder: Path, scale: str) -> None:
    rewritten(folder, with_scales(DOWN + scale))
    words = (
        rf"the weights are quantized: {DOWN}{scale} in model\.safetensors scales another tensor; name the checkpoint"
    )
    with pytest.raises(UsageError, match=words):
        check_headers(captured(opened(folder)), opened(folder))


@pytest.mark.parametrize("name", ["input_scale", "qweight", "qzeros", "g_idx", "SCB", "weight_packed"])
def test_pieces_of_packed_weights_are_quantised(folder: Path, name: str) -> None:
    rewritten(folder, with_scales(f"model.layers.1.mlp.down_proj.{name}", dtype=torch.float32))
    with pytest.raises(UsageError, match=rf"quantized: model\.layers\.1\.mlp\.down_proj\.{name} in"):
        check_headers(captured(opened(folder)), opened(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_whole_numbers_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    rewritten(folder, with_scales(dtype=dtype))
    with pytest.raises(
        UsageError, match=rf"{DOWN} in model\.safetensors is held as \w+, and the model's is of floating"
    ):
        check_headers(captured(opened(folder)), opened(folder))


def test_floats_of_eight_bits_without_a_scale_are_weights(folder: Path) -> None:
    rewritten(folder, with_scales())
    weights = opening(folder)
    assert weights[DOWN].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_found_as_bytes_are_read(folder: Path, value: float, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors[DOWN][3, 5] = value
        return tensors

    rewritten(folder, change)
    with pytest.raises(
        WorkError, match=rf"model\.safetensors: {DOWN} holds -?(nan|inf) at \[3, 5\]; the weights are damaged"
    ):
        opening(folder)


def test_numbers_that_the_dtype_cannot_hold(folder: Path) -> None:
    checkpoint = opened(folder)
    model = captured(checkpoint)
    model.stored_dtype = lambda _: torch.float16
    rewritten(folder, lambda tensors: tensors | {DOWN: tensors[DOWN] * 1e6})
    checkpoint = opened(folder)
    source = open_weights(model, checkpoint)
    with pytest.raises(WorkError, match=r"which torch\.float16 cannot; write `teacher\.dtype: float32` into the spec"):
        source.get(DOWN)


def test_a_tied_head_that_holds_no_number_is_not_another_head(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.embed_tokens.weight"][0, 0] = float("nan")
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    rewritten(folder, change)
    with pytest.raises(WorkError, match=r"embed_tokens\.weight holds nan at \[0, 0\]|lm_head\.weight holds nan"):
        opening(folder)


def test_a_lone_tied_head_is_the_embedding(folder: Path, teacher: Path) -> None:
    rewritten(
        folder,
        lambda tensors: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in tensors.items()},
    )
    assert torch.equal(
        opening(folder)["model.embed_tokens.weight"], load_file(teacher / SINGLE)["model.embed_tokens.weight"]
    )


def with_more(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: torch.ones(4) for name in names}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.gate.weight",
        "model.layers.2.mlp.up_proj.weight",
    ],
    ids=["a bias", "a module", "a layer"],
)
def test_tensors_that_config_json_does_not_speak_of_are_another_model(folder: Path, name: str) -> None:
    rewritten(folder, with_more(name))
    with pytest.raises(
        UsageError, match=rf"have a tensor {name} .*which the model that config\.json describes has not"
    ):
        check_headers(captured(opened(folder)), opened(folder))


def test_layers_that_predict_further_tokens_and_old_tables_are_passed_over(folder: Path) -> None:
    parts = ("rotary_emb.inv_freq", "bias", "masked_bias", "causal_mask")
    tables = [f"model.layers.0.self_attn.{part}" for part in parts]
    rewritten(folder, with_more("model.layers.2.eh_proj.weight", *tables))
    change_config(folder, num_nextn_predict_layers=1)
    assert check_headers(captured(opened(folder)), opened(folder))


def test_the_head_of_another_task_is_passed_over_to_the_end(foundry: Foundry, folder: Path) -> None:
    """As the plan says, which a compile must not contradict."""
    rewritten(folder, with_more("score.weight"))
    made = foundry.build(folder, {"intermediate_size": 24}, program=False)
    assert made.plan.remarks[0].endswith("are not the model's and are ignored, such as score.weight")
    assert all(check["passed"] for check in made.checks.values())
    assert "score.weight" not in made.tensors


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["of another task", "the base model"])
def test_a_model_saved_without_its_head(tmp_path: Path, prefix: str) -> None:
    folder = save_teacher(tmp_path / "whole", tiny_config("llama", num_hidden_layers=1))

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["lm_head.weight"]
        return {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()} | {
            "score.weight": torch.ones(3, 32)
        }

    rewritten(folder, change)
    with pytest.raises(
        UsageError,
        match=r"saved without the head of a language model: lm_head\.weight is missing; it has score\.weight in its place",
    ):
        check_headers(captured(opened(folder)), opened(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (SINGLE, r"model\.safetensors is a file; name the folder that holds it and config\.json: .*teacher$"),
        ("x.gguf", r"x\.gguf is not a folder; GGUF files are conversions for llama\.cpp: name the Hugging Face folder"),
    ],
)
def test_a_file_is_no_teacher(folder: Path, name: str, words: str) -> None:
    (folder / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=words):
        opened(folder / name)


# -- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("_orig_mod.", "saved while torch.compile wrapped it"),
        ("module.", "saved inside a data-parallel wrapper"),
        ("base_model.model.", "call merge_and_unload"),
        ("language_model.", "language tower of a multimodal model"),
        ("student.inner.", "rename the tensors without it"),
    ],
)
def test_foreign_prefixes_are_named_in_the_plan(folder: Path, prefix: str, words: str) -> None:
    rewritten(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    checkpoint = opened(folder)
    with pytest.raises(UsageError) as caught:
        check_headers(captured(checkpoint), checkpoint)
    message = str(caught.value)
    assert f"`{prefix}` in their names ({prefix}model." in message and words in message


def test_layers_that_were_wrapped_one_by_one(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace(".self_attn", "._orig_mod.self_attn").replace(".mlp", "._orig_mod.mlp"): t
            for name, t in tensors.items()
        }

    rewritten(folder, change)
    checkpoint = opened(folder)
    with pytest.raises(UsageError, match=r"`_orig_mod\.` in their names"):
        check_headers(captured(checkpoint), checkpoint)


def test_pieces_of_an_adapter_among_the_weights(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inner = {name.replace("down_proj.weight", "down_proj.base_layer.weight"): t for name, t in tensors.items()}
        return inner | {"model.layers.1.mlp.down_proj.lora_A.default.weight": torch.ones(2, 40)}

    rewritten(folder, change)
    checkpoint = opened(folder)
    with pytest.raises(UsageError, match="the files hold the pieces of an adapter: call merge_and_unload"):
        check_headers(captured(checkpoint), checkpoint)


def test_names_that_transformers_itself_converts_are_not_foreign(tmp_path: Path) -> None:
    """The base model of a GPT-NeoX was saved: its names lack the prefix of the whole one."""
    save_teacher(tmp_path, tiny_config("gpt_neox", num_hidden_layers=2))
    rewritten(tmp_path, lambda tensors: {n.removeprefix("gpt_neox."): t for n, t in tensors.items()})
    checkpoint = opened(tmp_path)
    assert check_headers(captured(checkpoint), checkpoint) is False
    assert open_weights(captured(checkpoint), checkpoint).get("gpt_neox.final_layer_norm.weight").shape == (32,)


# -- links --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "additional_chat_templates/x.jinja"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        UsageError, match=rf"{name} is a link to .*secret, outside of the checkpoint's folder; copy the"
    ):
        opened(folder)


def test_loops_of_links_and_folders_are_not_followed(folder: Path) -> None:
    for name in ("tokenizer_assets", "additional_chat_templates"):
        (folder / name).mkdir()
        (folder / name / "loop").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "tokenizer.model")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    names = {path.relative_to(folder).as_posix() for path in tokenizer_files(folder)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"}


def test_links_of_the_hub_cache_are_followed_and_templates_copied(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("1" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for number, path in enumerate(one for one in folder.rglob("*") if one.is_file()):
        blob = repository / "blobs" / str(number)
        path.rename(blob)
        (snapshot / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        (snapshot / path.relative_to(folder)).symlink_to(blob)
    assert opened(snapshot).tensors
    (tmp_path / "copy").mkdir()
    copy_tokenizer_and_settings(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))


# -- identity -----------------------------------------------------------------------------------------------------------


def test_weights_of_the_same_shapes_are_another_teacher(folder: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: locked\nteacher:\n  model: teacher\nstudent:\n  layers: {keep: [0]}\n")
    before, _ = renew(load_spec(spec))
    rewritten(folder, lambda tensors: tensors | {DOWN: tensors[DOWN] + 1})
    after, written = renew(load_spec(spec))
    assert written and before["teacher"]["weights"] != after["teacher"]["weights"]  # type: ignore[index, call-overload]
    assert {k: v for k, v in before["teacher"].items() if k != "weights"} == {  # type: ignore[union-attr]
        k: v
        for k, v in after["teacher"].items()
        if k != "weights"  # type: ignore[union-attr]
    }


class Replacing(Silent):
    """Another process, which saves other weights of the same shapes when the student is verified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        if name == "verify":
            rewritten(self.folder, lambda tensors: tensors | {DOWN: tensors[DOWN] * 1.5})
        return super().task(name, total, unit, done)


def test_a_teacher_that_changes_while_it_is_compiled(foundry: Foundry, folder: Path, tmp_path: Path) -> None:
    loaded = foundry.load(folder, {"layers": {"keep": [0]}})
    with pytest.raises(WorkError, match=r"model\.safetensors changed while it was in use; let it rest"):
        foundry.compile(loaded, tmp_path / "build", Replacing(folder), program=False)
    assert not (tmp_path / "build" / "verification.json").exists()


def test_data_that_changes_while_a_student_is_compiled(foundry: Foundry, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on a mat\n" * 40)
    data = {"text": [str(text)], "samples": 2, "sequence_length": 8}
    loaded = foundry.load(folder, {"intermediate_size": 24}, importance={"data": data})

    class Writing(Silent):
        def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
            if name == "verify":
                text.write_text("a mat sat on the cat\n" * 40)
            return super().task(name, total, unit, done)

    with pytest.raises(
        WorkError, match=r"data importance\.data .*a\.txt changed while the student was compiled; let it rest"
    ):
        foundry.compile(loaded, tmp_path / "build", Writing(), program=False)
    assert not (tmp_path / "build" / "verification.json").exists()


def test_a_build_of_other_weights_is_stale_and_its_training_is_kept(
    foundry: Foundry, folder: Path, tmp_path: Path
) -> None:
    loaded, build = foundry.load(folder, {"layers": {"keep": [0]}}), tmp_path / "build"
    foundry.compile(loaded, build, program=False)
    assert why_stale(build, loaded) is None
    rewritten(folder, lambda tensors: tensors | {DOWN: tensors[DOWN] * 1.5})
    assert "compiled from other inputs: teacher weights is built from" in str(why_stale(build, loaded))
    (build / "model").mkdir()
    with pytest.raises(UsageError, match="holds the training of another student"):
        foundry.compile(loaded, build, program=False)


def test_keys_that_are_given_layer_by_layer(tmp_path: Path) -> None:
    """Gemma 4 as it is by default: the heads of its global layers are wider."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    AutoConfig.for_model("gemma4_text", **text, head_dim=8, global_head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"gives head_dim of a gemma4_text model layer by layer \(per_layer_config\)"):
        opened(tmp_path, weights=False)


# -- several towers -----------------------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def towers(folder: Path, family: str) -> Any:
    """A tiny multimodal model, saved."""
    default = AutoConfig.for_model(family)
    parts = {
        name: {"model_type": getattr(default, name).model_type}
        | {k: v for k, v in keys.items() if hasattr(getattr(default, name), k)}
        for name, keys in (("text_config", TEXT), ("vision_config", VISION))
    }
    with quiet():
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts)).eval()
        model.save_pretrained(folder)
    return model


def test_towers_without_a_class_of_their_own(tmp_path: Path) -> None:
    towers(tmp_path, "qwen2_5_vl")
    with pytest.raises(UsageError, match=r"no text-only class for its language tower \(qwen2_5_vl_text\)"):
        opened(tmp_path)
