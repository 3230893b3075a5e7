"""Exported files, loaded and computed by llama.cpp itself: logits and tokens are those of transformers.

Runs where `pip install llama-cpp-python`, which builds llama.cpp from its sources, has been done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runtime.test_export import FAMILIES, LLAMA3, export, made

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is built from sources")

CASES = {**FAMILIES, "llama, scaled positions": ("llama", {"head_dim": 8, "rope_parameters": LLAMA3})}
F32 = 0  # ggml's number of the type


@contextmanager
def loaded(file: Path) -> Iterator[Any]:
    """The file in llama.cpp, with keys and values in fp32 so that only the order of sums differs."""
    model = llama_cpp.Llama(
        str(file), n_ctx=64, n_batch=64, logits_all=True, type_k=F32, type_v=F32, n_threads=1, verbose=False
    )
    try:
        yield model
    finally:
        model.close()


def logits_of(file: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    with loaded(file) as model:
        model.eval(ids)
        return np.array(model.scores[: len(ids)], copy=True)


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    family, changes = CASES[name]
    model = made(tmp_path, family, torch.float32, **changes)
    ids = list(range(3, 43))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = logits_of(export(tmp_path, "f32"), ids)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.shared
@pytest.mark.parametrize(("weight_type", "error"), [("f32", 1e-3), ("bf16", 3e-2), ("q8_0", 5e-2)])
def test_a_trained_model_and_its_tokenizer(tmp_path: Path, weight_type: str, error: float) -> None:
    shared = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
    if not shared.is_dir():
        pytest.skip("needs ../shared/data/stories260K")
    shutil.copytree(shared, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(shared)
    model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32)
    file = export(tmp_path, weight_type, pre=None)
    text = "Once upon a time, there was a little girl named Lily. She liked 12 cats & dogs!"
    ids = tokenizer(text).input_ids
    with loaded(file) as theirs:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = logits_of(file, ids)
    assert np.abs(found - expected).max() < error * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9
