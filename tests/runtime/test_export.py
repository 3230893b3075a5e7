"""Exported files, read back by transformers' own reader of the format: every tensor, the logits, the tokenizer."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.runtime.export.gguf_families import interleave
from minitron.specs.errors import UsageError
from minitron.specs.progress import Silent
from tests.models import POSITIONS, save_teacher, tiny_config

gguf = pytest.importorskip("gguf", reason="gguf is an extra")

from minitron.runtime.export import export_gguf  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 8}),
    "llama, tied": ("llama", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral, a head that is no share of the hidden width": ("mistral", {"head_dim": 12, "sliding_window": None}),
    "qwen2, biases": ("qwen2", {"use_sliding_window": False}),
    "qwen3, norms of heads": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}


def made(build: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    save_teacher(build / "student", tiny_config(family, **changes), dtype)
    return AutoModelForCausalLM.from_pretrained(build / "student", dtype=torch.float32)


def export(build: Path, weight_type: Any = "bf16", pre: str | None = "gpt-2", target: Path | None = None) -> Path:
    return export_gguf(build, target, weight_type, pre=pre, progress=Silent())


def read_back(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_read_back_as_it_was(tmp_path: Path, name: str) -> None:
    family, changes = FAMILIES[name]
    ours = made(tmp_path, family, **changes)
    theirs = read_back(export(tmp_path))
    expected, found = ours.state_dict(), theirs.state_dict()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        assert getattr(theirs.config, key) == getattr(ours.config, key)


def test_fp32_is_kept_and_8_bits_are_the_nearest(tmp_path: Path) -> None:
    ours = made(tmp_path, "llama", torch.float32, head_dim=8, hidden_size=64, intermediate_size=96)
    exact = read_back(export(tmp_path, "f32")).state_dict()
    file = export(tmp_path, "q8_0")
    rough = read_back(file).state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(exact[key], tensor)
        if tensor.ndim == 2:  # half a step of 127, of the largest in each block of 32 weights; its scale is in fp16
            blocks = tensor.unflatten(1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            assert ((rough[key].unflatten(1, (-1, 32)) - blocks).abs() <= 0.5 * step + 127 * step / 1000).all()
        else:
            assert torch.equal(rough[key], tensor)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"


def test_rows_that_8_bits_cannot_divide_stay_in_16(tmp_path: Path) -> None:
    made(tmp_path, "llama", head_dim=8)  # rows of 40 in the feed-forward's last projection
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(export(tmp_path, "q8_0")).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("BF16", "Q8_0")


def test_llama_3_1_s_frequencies_are_written_as_factors(tmp_path: Path) -> None:
    model = made(tmp_path, "llama", head_dim=8, rope_parameters=LLAMA3)
    (factors,) = [one.data for one in gguf.GGUFReader(export(tmp_path)).tensors if one.name == "rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(plain / torch.tensor(factors), model.model.rotary_emb.inv_freq)
    assert factors.max() == pytest.approx(8.0) and factors.min() == pytest.approx(1.0)


def test_halves_of_a_head_become_neighbours() -> None:
    rows = torch.arange(12).unsqueeze(1)
    assert interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    made(tmp_path, "llama", head_dim=8)
    file = export(tmp_path)
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path / "student"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name),
    )
    for text in ("the cat sat on a mat", "seven birds", "an apple, a tree"):
        assert theirs(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == ours.eos_token_id
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 96 and types[:4] == [3, 3, 3, 1] and len(ours) == 94 and types[94:] == [5, 5]


@pytest.mark.shared
def test_a_trained_model_with_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    shared = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
    if not shared.is_dir():
        pytest.skip("needs ../shared/data/stories260K")
    shutil.copytree(shared, tmp_path / "student")
    file = export(tmp_path, "f32", pre=None)
    ours = AutoTokenizer.from_pretrained(tmp_path / "student")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in ("Once upon a time, there was a little girl named Lily.", "Tom & Jerry's 12 cats!", "one\ntwo"):
        assert theirs(text).input_ids == ours(text).input_ids
    ids = torch.tensor([ours("Once upon a time").input_ids])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)(ids).logits
        assert torch.equal(read_back(file)(ids).logits, expected)


def test_the_distilled_model_is_what_is_exported(tmp_path: Path) -> None:
    made(tmp_path, "llama", head_dim=8)
    assert export(tmp_path).name == "student-bf16.gguf"
    (tmp_path / "student").rename(tmp_path / "model")
    assert export(tmp_path).name == "model-bf16.gguf"
    assert export(tmp_path, target=tmp_path / "own.gguf") == tmp_path / "own.gguf"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "a gpt_oss model .* the layout of its weights"),
        ("doge", {}, "a doge model cannot be written as GGUF: the format has no names for its parts; possible are llama"),
        ("mistral", {"sliding_window": 8}, "a mistral model with a sliding window of 8 tokens cannot be written"),
        ("llama", {"attention_bias": True}, "a llama model with `attention_bias` cannot be written"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaled as `linear`"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    from transformers import AutoConfig

    common = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, vocab_size=96, num_key_value_heads=2, head_dim=8, max_position_embeddings=POSITIONS, **common, **changes
    )
    save_teacher(tmp_path / "student", config)
    with pytest.raises(UsageError, match=message):
        export(tmp_path)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_tokenizer_whose_rules_cannot_be_told(tmp_path: Path) -> None:
    made(tmp_path, "llama", head_dim=8)
    with pytest.raises(UsageError, match=r"how this tokenizer cuts text before .* write --pre NAME"):
        export(tmp_path, pre=None)


def test_a_folder_without_a_model_and_a_folder_as_target(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has neither model/ nor student/; `minitron compile SPEC"):
        export(tmp_path)
    made(tmp_path, "llama", head_dim=8)
    with pytest.raises(UsageError, match="is a folder; name a file with -o"):
        export(tmp_path, target=tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'minitron\[gguf\]'"):
        export(tmp_path)
