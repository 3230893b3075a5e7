"""The teacher that is committed with the quickstart: what its card says is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minitron.specs import load_spec
from minitron.specs.stdlib_corpus import stdlib_files

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
TEACHER = QUICKSTART / "teacher"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TEACHER)


def test_it_fits_into_a_repository() -> None:
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= 5_000_000


def test_it_is_a_mistral_whose_shape_leaves_nothing_to_assume() -> None:
    config = AutoConfig.from_pretrained(TEACHER)
    assert config.model_type == "mistral" and config.sliding_window is None
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert not config.tie_word_embeddings
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text", ["def f(x):\n\tif x:\r\n        return  1\n\n\n", "é, 日本, \U0001f40d\n", "  leading", ""]
)
def test_the_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_gives_the_held_out_modules_back(tokenizer: Any) -> None:
    for path in stdlib_files("held_out"):
        text = path.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_it_predicts_modules_that_it_never_saw_about_as_well_as_its_card_says(tokenizer: Any) -> None:
    card = (TEACHER / "README.md").read_text(encoding="utf-8")
    claimed = float(re.findall(r"held-out loss \(nats a token\) \| ([\d.]+)", card)[0])
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    losses = []
    for path in stdlib_files("held_out"):
        text = path.read_text(encoding="utf-8")
        ids = tokenizer(text[:100_000], add_special_tokens=False).input_ids[: 255 * 4]
        rows = [ids[i : i + 255] for i in range(0, len(ids) - 254, 255)]
        if rows:
            chunks_BS = torch.tensor([[tokenizer.bos_token_id, *row] for row in rows])
            with torch.no_grad():
                logits = model(chunks_BS).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), chunks_BS[:, 1:].flatten()).item())
    # The beginnings of the files only, and another Python may have other files.
    assert sum(losses) / len(losses) == pytest.approx(claimed, rel=0.15)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_teacher", QUICKSTART / "train_teacher.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_card_of_a_further_round_tells_of_every_earlier_one(script: ModuleType, tmp_path: Path) -> None:
    figures = {
        "held-out loss (nats a token)": "2.5",
        "training tokens seen": "4,096, 1.0 epochs of 4,000",
        "steps": "1 of 16 x 256 tokens",
        "training time": "3.0 minutes",
    }
    (tmp_path / "README.md").write_text(script.model_card(script.Recipe(), figures))
    first = script.earlier_rounds(tmp_path)
    assert first == {
        "round 1": "4,096, 1.0 epochs of 4,000; 1 of 16 x 256 tokens; 3.0 minutes; lr 0.003, seed 0; held-out loss 2.5",
    }
    again = figures | first | {"training time": "5.0 minutes", "held-out loss (nats a token)": "2.4"}
    (tmp_path / "README.md").write_text(script.model_card(script.Recipe(), again))
    second = script.earlier_rounds(tmp_path)
    assert list(second) == ["round 1", "round 2"] and second["round 1"] == first["round 1"]
    assert second["round 2"].endswith("5.0 minutes; lr 0.003, seed 0; held-out loss 2.4")


def test_its_spec_is_valid_and_makes_it_smaller() -> None:
    spec = load_spec(QUICKSTART / "spec.yaml").spec
    config = AutoConfig.from_pretrained(TEACHER)
    for key, target in spec.student.targets():
        assert isinstance(target, int) and target < getattr(config, key), key
