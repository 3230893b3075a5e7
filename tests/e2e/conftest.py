"""A tiny real teacher, texts and a spec for it, and the real command in a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .tiny import COMMAND, SPEC, TIMEOUT, Command, environment


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def minitron(home: Path) -> Command:
    """Runs the command to its end in a process of its own."""

    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment(home),
            cwd=cwd,
            timeout=TIMEOUT,
        )

    return run


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher/` (a Llama of 3 layers, random weights, its own tokenizer), texts and `tiny.yaml`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("workshop")
    animals, verbs = ("cat", "dog", "hen", "fox", "owl"), ("sees", "likes", "finds", "hears")
    lines = [f"the {one} {verb} the {other} ." for one in animals for verb in verbs for other in animals]
    (folder / "corpus.txt").write_text("\n".join(lines[::2] * 4))
    (folder / "held_out.txt").write_text("\n".join(lines[1::2]))

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(lines, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "teacher")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(SPEC)
    return folder


@pytest.fixture(scope="session")
def finished(workshop: Path, minitron: Command) -> subprocess.CompletedProcess[str]:
    """`minitron run` from beginning to end, once; its build is `workshop/builds/tiny`."""
    return minitron("run", workshop / "tiny.yaml", "--device", "cpu")
