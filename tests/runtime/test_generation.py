"""How models generate: their own settings are carried on where they make sense, and never meddle with what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from minitron.runtime import evaluate, train
from minitron.runtime.generate import continue_greedily
from minitron.runtime.models import LanguageModel
from minitron.specs.errors import WorkError
from minitron.specs.generation_settings import read_generation_settings, without_contradictions
from minitron.specs.progress import Silent
from minitron.specs.training_plan import HeadPlan
from tests.runtime import tiny

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "do_sample": st.booleans(),
    "temperature": st.sampled_from([0.7, 1.0]),
    "top_p": st.sampled_from([0.9, 1.0]),
    "top_k": st.sampled_from([20, 50]),
    "min_p": st.just(0.1),
    "typical_p": st.just(0.5),
    "num_beams": st.sampled_from([1, 4]),
    "early_stopping": st.booleans(),
    "length_penalty": st.just(2.0),
    "num_return_sequences": st.sampled_from([1, 3, 6]),
    "use_cache": st.booleans(),
    "cache_implementation": st.just("static"),
    "return_dict_in_generate": st.booleans(),
    "output_scores": st.booleans(),
    "pad_token_id": st.sampled_from([-1, 0]),
    "repetition_penalty": st.just(1.2),
    "eos_token_id": st.sampled_from([1, [1, 2]]),
}


@given(st.fixed_dictionaries({}, optional=SETTINGS))
@settings(max_examples=300, deadline=None)
def test_what_is_left_is_valid_and_means_the_same(given_settings: dict[str, Any]) -> None:
    """By the check that transformers makes before it saves."""
    left = without_contradictions(given_settings)
    GenerationConfig(**left).validate(strict=True)
    assert left.items() <= given_settings.items() and without_contradictions(left) == left
    for key in ("do_sample", "num_beams", "repetition_penalty", "eos_token_id", "use_cache"):
        assert left.get(key) == given_settings.get(key)
    if given_settings.get("do_sample"):
        assert left.get("temperature") == given_settings.get("temperature")


@pytest.mark.parametrize("content", ["[1, 2]", "not json", '"text"', "[" * 100_000])
def test_a_file_that_holds_no_settings(tmp_path: Path, content: str) -> None:
    assert read_generation_settings(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(content)
    assert read_generation_settings(tmp_path) is None


MEDDLING = {
    "stop_strings": ["the"], "num_return_sequences": 3, "do_sample": True, "return_dict_in_generate": True,
    "output_scores": True, "repetition_penalty": 5.0, "suppress_tokens": [5, 6, 7], "guidance_scale": 3.0,
    "bad_words_ids": [[8]], "min_new_tokens": 40, "eos_token_id": 1, "num_beams": 3, "max_length": 3,
}  # fmt: skip


@pytest.mark.parametrize("settings_of", [MEDDLING, [1, 2]], ids=["meddling", "a list"])
def test_a_model_s_own_settings_change_nothing_that_is_measured(build: Path, settings_of: Any) -> None:
    for folder in (build.parent / "teacher", build / "student"):
        (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    tiny.verify(build)
    plain = evaluate(build, device="cpu", progress=Silent())
    for folder in (build.parent / "teacher", build / "student"):
        (folder / "generation_config.json").write_text(json.dumps(settings_of))
    (build / "measurements.json").unlink()
    tiny.verify(build)
    measured = evaluate(build, device="cpu", progress=Silent())
    for name, model in plain["models"].items():
        assert measured["models"][name]["continuation"] == model["continuation"]
        assert measured["models"][name]["held_out"] == model["held_out"]


def test_the_distilled_model_keeps_settings_and_all_chat_templates(build: Path) -> None:
    student = build / "student"
    (student / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    (student / "additional_chat_templates").mkdir()
    (student / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (student / "other").mkdir()
    (student / "other" / "file.jinja").write_text("not a tokenizer's")
    tiny.verify(build)
    train(build, device="cpu", progress=Silent())
    model = build / "model"
    assert (model / "generation_config.json").read_text() == (student / "generation_config.json").read_text()
    assert (model / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert not (model / "other").exists()
    assert GenerationConfig.from_pretrained(model).temperature == 0.6


def test_settings_that_transformers_refuses_are_named(build: Path) -> None:
    (build / "student" / "generation_config.json").write_text('{"max_new_tokens": -1}')
    tiny.verify(build)
    with pytest.raises(
        WorkError, match=r"generation_config\.json cannot be used \(.*max_new_tokens.*correct it, or remove it"
    ):
        evaluate(build, device="cpu", progress=Silent())


def test_greedy_is_the_most_likely_token_each_time() -> None:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(tiny.llama(16)).eval()
    for key, value in MEDDLING.items():
        setattr(module.generation_config, key, value)
    model = LanguageModel(module, HeadPlan.model_validate(tiny.HEAD))
    ids = [5, 6, 7]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    assert continue_greedily(model, [5, 6, 7], 6, to_the_end=True) == ids[3:]
    assert module.generation_config.repetition_penalty == 5.0, "the model's own settings are left as they are"
