"""A real model that others trained: what the runtime says of it is what is known of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minitron.runtime import evaluate, train
from minitron.specs.progress import Silent
from tests.runtime import tiny

SHARED = Path(__file__).parents[3] / "shared" / "data"
STORIES = SHARED / "stories260K"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/data/stories260K is not there"),
]


def test_a_student_with_a_layer_less_tells_the_same_stories(tmp_path: Path) -> None:
    """One layer less: its held-out loss comes down on what the teacher tells, most of the way to the teacher's."""
    build = tmp_path / "build"
    teacher = AutoModelForCausalLM.from_pretrained(STORIES)
    config = AutoConfig.from_pretrained(STORIES)
    config.num_hidden_layers = 4
    student = AutoModelForCausalLM.from_config(config)
    kept = {
        name.replace("layers.4.", "layers.3."): w for name, w in teacher.state_dict().items() if "layers.3." not in name
    }
    student.load_state_dict(kept)
    student.save_pretrained(build / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, build / "student")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    torch.manual_seed(0)
    told = teacher.generate(torch.ones(96, 1, dtype=torch.long), do_sample=True, max_new_tokens=250, pad_token_id=2)
    texts = tokenizer.batch_decode(told, skip_special_tokens=True)
    (tmp_path / "train.txt").write_text("\n\n".join(text.replace("\n\n", "\n") for text in texts))
    stories = (SHARED / "text" / "tinystories_sample.txt").read_text().split("<|endoftext|>")
    (tmp_path / "valid.txt").write_text("\n\n".join(story.replace("\n\n", "\n") for story in stories))
    tiny.verify(build)
    tiny.write_plan(
        build,
        teacher__model=str(STORIES),
        data={"text": ["../train.txt"], "document": "paragraph"},
        sequence_length=256,
        tokens=256 * 4 * 50,
        held_out={
            "data": {"text": ["../valid.txt"], "document": "paragraph"},
            "max_tokens": 100_000,
            "every_tokens": None,
        },
        evaluate={"suite": [], "data_dir": None, "prompt": "Once upon a time", "continuation_tokens": 30},
    )
    torch.set_num_threads(1)
    train(build, device="cpu", progress=Silent())
    results = evaluate(build, device="cpu", progress=Silent())
    models = results["models"]
    assert models["teacher"]["parameters"] == 260_032
    assert models["teacher"]["held_out"]["perplexity"] < 5
    assert (
        models["teacher"]["held_out"]["loss"]
        < models["distilled"]["held_out"]["loss"]
        < models["pruned"]["held_out"]["loss"]
    )
    assert results["recovered"] > 0.3
    assert models["teacher"]["continuation"].strip()
