"""The teacher on disk: which folders can be read, and a sentence with what to do for each that cannot."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from minitron.compiler.capture.capture import Captured as CapturedModel
from minitron.compiler.capture.models import build_meta, canonical_names, find_layers, quiet
from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.compiler.plan.plan import make_plan
from minitron.compiler.teacher.checkpoint import Checkpoint, open_checkpoint
from minitron.compiler.weights.source import StreamedWeights, check_headers, open_weights
from minitron.specs.data import DataSource
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.weight_files import INDEX, SINGLE
from tests import models
from tests.foundry import Foundry
from tests.models import random_model, save_teacher, tiny_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("whole"), tiny_config("llama", num_hidden_layers=2))


@pytest.fixture
def folder(teacher: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    copy = tmp_path / "teacher"
    copy.mkdir()
    for path in teacher.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same teacher in several files."""
    folder = tmp_path / "sharded"
    with quiet():
        random_model(tiny_config("llama", num_hidden_layers=2)).save_pretrained(folder, max_shard_size="20KB")
    return folder


class Captured:
    """As much of a captured model as weights are compared with; tracing it would take seconds."""

    def __init__(self, config: Any) -> None:
        self.model = build_meta(config, torch.float32, "sdpa")
        self.canonical = canonical_names(self.model)
        self.config = config
        self.layer_path, self.layer_count = find_layers(self.model, config)

    def layer_in_path(self, path: str) -> int | None:
        return CapturedModel.layer_in_path(self, path)  # type: ignore[arg-type]

    def stored_dtype(self, _: str) -> torch.dtype:
        return torch.float32


def opened(folder: Path, *, weights: bool = True) -> Checkpoint:
    return open_checkpoint(str(folder), None, Path("/"), weights=weights)


def captured(checkpoint: Checkpoint) -> Any:
    return Captured(checkpoint.config)


def change_config(folder: Path, **keys: Any) -> None:
    """None removes a key."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# -- what can be read ---------------------------------------------------------------------------------------------------


def test_one_file_and_several_hold_the_same(teacher: Path, sharded: Path) -> None:
    one, several = opened(teacher), opened(sharded)
    assert len({info.file for info in several.tensors.values()}) > 3
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in one.tensors.items()} == {
        n: (i.dtype, i.shape, i.nbytes) for n, i in several.tensors.items()
    }
    sources = [open_weights(captured(checkpoint), checkpoint) for checkpoint in (one, several)]
    assert all(isinstance(source, StreamedWeights) for source in sources)
    for name in one.tensors:
        assert torch.equal(sources[0].get(name), sources[1].get(name))


def test_headers_say_what_the_weights_are(teacher: Path) -> None:
    weights, tensors = load_file(teacher / SINGLE), opened(teacher).tensors
    assert {name: (info.shape, info.nbytes) for name, info in tensors.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in weights.items()
    }
    assert {(info.dtype, info.file) for info in tensors.values()} == {("F32", teacher / SINGLE)}


def test_a_folder_is_relative_to_the_spec(teacher: Path) -> None:
    checkpoint = open_checkpoint(teacher.name, None, teacher.parent, weights=True)
    assert checkpoint.folder == teacher.resolve() and checkpoint.name == teacher.name


@pytest.mark.parametrize("listed", [False, True], ids=["one file", "an index"])
def test_the_configuration_alone_is_enough_for_a_preview(folder: Path, listed: bool) -> None:
    """Also beside the index of shards that nobody has downloaded."""
    (folder / SINGLE).unlink()
    if listed:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}})
        )
    assert opened(folder, weights=False).tensors == {}
    with pytest.raises(WorkError, match="no weights in safetensors format; copy the weight files there"):
        opened(folder)


def test_code_that_comes_with_a_model_that_transformers_knows_is_passed_over(folder: Path) -> None:
    """And the student, whose folder will not have that code, does not name it."""
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")
    change_config(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    config = opened(folder).config
    assert config.model_type == "llama" and "auto_map" not in config.to_dict()


# -- configurations -----------------------------------------------------------------------------------------------------


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})


CONFIGURATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (lambda f: (f / "config.json").unlink(), "has no config.json; it is not a Hugging Face checkpoint"),
    "cut short": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", '),
        r"config\.json is not valid JSON \(.*\); copy the file again from its source",
    ),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "names no model_type"),
    "no type": (lambda f: change_config(f, model_type=None), "names no model_type; it is not the configuration"),
    "unknown type": (lambda f: change_config(f, model_type="no-such"), "cannot be read by transformers: .*no-such"),
    "a width that is a word": (lambda f: change_config(f, hidden_size="wide"), "cannot be read by transformers: "),
    "own code": (
        own_code,
        r"the code of a own model comes with its checkpoint \(auto_map\), and such code is never run",
    ),
    "quantized": (
        lambda f: change_config(f, quantization_config={"quant_method": "fp8", "fmt": "e4m3"}),
        r"the weights are quantized \(quantization_config\); name the checkpoint that they were made from",
    ),
    "no layers": (lambda f: change_config(f, num_hidden_layers=0), "says that the model has 0 layers"),
    "widths that do not divide": (
        lambda f: change_config(f, num_attention_heads=5, head_dim=None),
        r"The hidden size \(32\) is not a multiple of the number of attention heads \(5\)",
    ),
    "no language model": (
        lambda f: change_config(f, model_type="vit", architectures=None),
        "does not know as a causal language model; name a decoder-only text model",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("weights", [False, True], ids=["plan", "compile"])
def test_configurations_that_are_refused(folder: Path, name: str, weights: bool) -> None:
    """By the preview already: what it lets through, compiling lets through."""
    breaks, words = CONFIGURATIONS[name]
    breaks(folder)
    with pytest.raises(UsageError, match=words) as caught:
        opened(folder, weights=weights)
    assert str(folder) in str(caught.value) and "trust_remote_code" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(name, None, tmp_path, weights=False)
    words = "write a folder relative to the spec, or a Hugging Face id (owner/name)"
    assert str(caught.value) == f"there is no folder {tmp_path / name}; {words}"


def test_a_folder_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is asked through `os.access`, whose answer nobody can change for root."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    with pytest.raises(UsageError, match=rf"{folder} cannot be read \(permission denied\); check its permissions$"):
        open_checkpoint(str(folder), None, folder, weights=False)


# -- weight files -------------------------------------------------------------------------------------------------------


def raw_header(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", len(content)) + content)  # type: ignore[return-value]


def other_format(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def cut(folder: Path, end: int) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:end])


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickles only": (other_format, "no weights in safetensors format; convert other formats with save_pretrained"),
    "a conversion only": (
        lambda f: (f / SINGLE).rename(f / "model-Q4_K_M.gguf"),
        "no weights in safetensors format; GGUF files are conversions for llama.cpp: name the Hugging Face folder",
    ),
    "shards without an index": (
        lambda f: (f / SINGLE).rename(f / "model-00001-of-00001.safetensors"),
        "model-00001-of-00001.safetensors is there, and neither model.safetensors nor model.safetensors.index.json, which",
    ),
    "cut short": (lambda f: cut(f, -1), r"is not a whole safetensors file \(\d+ of \d+ bytes\); copy it again"),
    "cut in the header": (lambda f: cut(f, 100), r"not a whole safetensors file \(its header is longer than the file\)"),
    "cut in the length": (lambda f: cut(f, 5), "not a whole safetensors file"),
    "empty": (lambda f: cut(f, 0), "not a whole safetensors file"),
    "too long": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"more"),
        r"not a whole safetensors file \(\d+ of \d+ bytes\)",
    ),
    "a page of the web": (lambda f: (f / SINGLE).write_text("<!DOCTYPE html><html>"), "not a whole safetensors file"),
    "a pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        "not a whole safetensors file",
    ),
    "a header that is no mapping": (raw_header(b"[1, 2]"), "not a whole safetensors file"),
    "a header that is a word": (raw_header(b'"word"'), "not a whole safetensors file"),
    "a header of other things": (raw_header(b'{"a": {"dtype": "F32", "shape": [1]}}'), "not a whole safetensors file"),
    "a tensor without an end": (
        raw_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'),
        "not a whole safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_weight_files_that_are_refused(folder: Path, name: str) -> None:
    breaks, words = FILES[name]
    breaks(folder)
    with pytest.raises(WorkError, match=words) as caught:
        opened(folder)
    assert str(folder) in str(caught.value)


def test_a_shard_that_is_missing_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(WorkError, match=f"{gone.name} is named in {INDEX} and is not there; copy the checkpoint again"):
        opened(sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../other"}}']
)
def test_an_index_that_is_broken(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(WorkError, match=rf"{INDEX} is broken \(.*\); copy the checkpoint again"):
        opened(sharded)


def test_headers_that_contradict_the_configuration(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    checkpoint = opened(folder)
    words = (
        r"config\.json says that model\.layers\.0\.mlp\.gate_proj\.weight is \[48, 32\], the weight file has \[40, 32\] "
        r"\(and so with 5 more\); one of the two files belongs to another model"
    )
    with pytest.raises(UsageError, match=words):
        check_headers(captured(checkpoint), checkpoint)


def test_a_tensor_that_no_file_holds_is_named(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    checkpoint = opened(folder)
    words = r"1 tensor that the weight files have not, the first is model\.layers\.1\.mlp\.down_proj\.weight"
    with pytest.raises(UsageError, match=words):
        open_weights(captured(checkpoint), checkpoint)


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    checkpoint = opened(folder)
    source = open_weights(captured(checkpoint), checkpoint)
    cut(folder, -1000)
    with pytest.raises(WorkError, match=r"model\.safetensors changed while it was in use; let it rest"):
        source.get("lm_head.weight")


def test_a_file_that_changes_between_its_header_and_its_opening(folder: Path) -> None:
    """Of the same names and shapes, so that only the file itself tells."""
    checkpoint = opened(folder)
    save_file({name: one + 1 for name, one in load_file(folder / SINGLE).items()}, folder / SINGLE, {"format": "pt"})
    with pytest.raises(WorkError, match=r"model\.safetensors changed while it was in use; let it rest and run"):
        open_weights(captured(checkpoint), checkpoint).get("lm_head.weight")


def test_what_is_wrong_with_a_teacher_is_shown_at_its_line(foundry: Foundry, folder: Path) -> None:
    """The three kinds: a configuration, headers that contradict it, and weight files; and with the last two all else."""
    change_config(folder, intermediate_size=48)
    with pytest.raises(SpecInvalid, match=r"spec-\d+\.yaml:3:10: teacher\.model: .*belongs to another model"):
        foundry.plan(folder, {"hidden_size": 24})
    change_config(folder, model_type="no-such")
    with pytest.raises(SpecInvalid, match=r"spec-\d+\.yaml:3:10: teacher\.model: .*cannot be read by transformers"):
        foundry.plan(folder, {"hidden_size": 24})
    cut(folder, -1)
    change_config(folder, model_type="llama")
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(folder, {"hidden_size": 99})
    teacher, width = caught.value.errors
    assert teacher.path == "teacher.model" and "not a whole safetensors file" in teacher.message
    assert width.path == "student.hidden_size"


def test_a_tokenizer_that_cannot_be_loaded_is_noticed_by_the_plan(foundry: Foundry, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SpecInvalid, match=r":3:10: teacher\.model: .* has no tokenizer that transformers can load"):
        foundry.plan(folder, {"hidden_size": 24})


def test_chat_data_needs_a_chat_template(foundry: Foundry, folder: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a cat"}]}))
    data = {"jsonl": [str(chat)], "messages_field": "messages", "samples": 1, "sequence_length": 8}
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(folder, {"hidden_size": 24}, importance={"data": data})
    (error,) = caught.value.errors
    assert error.path == "importance.data.messages_field" and "no chat template" in error.message


def test_tied_teachers_need_no_second_copy(tmp_path: Path) -> None:
    save_teacher(tmp_path, tiny_config("qwen3", num_hidden_layers=2))
    checkpoint = opened(tmp_path)
    assert "lm_head.weight" not in checkpoint.tensors and AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert open_weights(captured(checkpoint), checkpoint).streamed


class TestVocabulary:
    """A tokenizer of another model is noticed before anything is computed."""

    def test_more_tokens_than_the_model_has_are_refused_with_all_other_errors(
        self, foundry: Foundry, tmp_path: Path
    ) -> None:
        shutil.copytree(foundry.teacher("llama"), tmp_path / "teacher")
        path = tmp_path / "teacher" / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[next(reversed(vocabulary))] = models.VOCABULARY
        path.write_text(json.dumps(tokenizer))
        data = {"text": ["nowhere.txt"]}
        loaded = foundry.load(
            tmp_path / "teacher", {"hidden_size": 99, "num_attention_heads": 8}, importance={"data": data}
        )
        with foundry.shortened(), pytest.raises(SpecInvalid) as caught:
            make_plan(loaded, build=tmp_path / "build", weights=True)
        found = {error.path: error for error in caught.value.errors}
        assert set(found) >= {
            "teacher.model", "student.hidden_size", "student.num_attention_heads", "importance.data.text.0",
        }  # fmt: skip
        assert (
            f"as token {models.VOCABULARY}, and the model has a vocabulary of {models.VOCABULARY}"
            in found["teacher.model"].message
        )
        assert all(error.line for error in found.values())

    def test_a_token_that_was_added_and_never_resized_is_a_remark(self, foundry: Foundry, tmp_path: Path) -> None:
        folder = with_added_token(foundry, tmp_path, "<image>")
        plan = foundry.plan(folder, {"hidden_size": 24})
        (remark,) = [one for one in plan.remarks if "<image>" in one]
        assert f"the tokenizer knows `<image>` as token {models.VOCABULARY}, and the model has a vocabulary" in remark

    def test_a_document_that_holds_it_is_refused(self, foundry: Foundry, tmp_path: Path) -> None:
        folder = with_added_token(foundry, tmp_path, "<image>")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        (tmp_path / "a.txt").write_text("the cat sat\nthe <image> sat\n" * 40)
        source = DataSource(text=(str(tmp_path / "a.txt"),), document="line")
        with pytest.raises(
            UsageError, match=r"a\.txt:2 yields token 96 \(`<image>`\), and the teacher's vocabulary has 96"
        ):
            calibration_samples(source, tokenizer, models.VOCABULARY, SampleConfig(4, 16))

    def test_an_end_token_that_the_model_lacks(self, foundry: Foundry, tmp_path: Path) -> None:
        folder = with_added_token(foundry, tmp_path, "<end>")
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<end>"}))
        with pytest.raises(
            SpecInvalid, match=r"its tokenizer puts `<end>` as token 96 around documents, and the model"
        ):
            foundry.plan(folder, {"hidden_size": 24})

    def test_a_padding_token_outside_the_vocabulary(self, foundry: Foundry, tmp_path: Path) -> None:
        shutil.copytree(foundry.teacher("llama"), tmp_path / "teacher")
        path = tmp_path / "teacher" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": models.VOCABULARY}))
        with pytest.raises(
            SpecInvalid, match=r"`pad_token_id` in its config\.json is 96, and the model has a vocabulary of 96"
        ):
            foundry.plan(tmp_path / "teacher", {"hidden_size": 24})


def with_added_token(foundry: Foundry, tmp_path: Path, token: str) -> Path:
    """A teacher whose tokenizer has one token more than the model."""
    shutil.copytree(foundry.teacher("llama"), tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    filling = [f"<{number}>" for number in range(len(tokenizer), models.VOCABULARY)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*filling, token]})
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_configuration_of_more_layers_than_the_files_hold(foundry: Foundry, tmp_path: Path) -> None:
    shutil.copytree(foundry.teacher("llama"), tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    loaded = foundry.load(tmp_path / "teacher", {"hidden_size": 24})
    with foundry.shortened(), pytest.raises(SpecInvalid, match="describes 9 tensors that the weight files have not"):
        make_plan(loaded, build=tmp_path / "build")
