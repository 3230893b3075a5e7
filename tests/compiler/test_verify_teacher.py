"""A teacher is refused before anything is computed with it where its graph is not its model, or where it looks ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from minitron.compiler.compilation import Compilation, run_buffers
from minitron.compiler.compile import Stages
from minitron.compiler.teacher_checks import verify_teacher
from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.hugging_face import load_model as loaded_in
from minitron.compiler.verify.hugging_face import logits_of
from minitron.compiler.verify.widened import InFloat32
from minitron.specs.errors import SpecInvalid, WorkError
from tests.foundry import Folder, Foundry, load_model, logits, token_ids
from tests.models import save_teacher

FFN = {"intermediate_size": 24}


def test_a_decoder_that_looks_ahead_is_refused(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in graph and model alike: every token is read with a little of the mean of all."""
    whole = LlamaMLP.forward

    def mixed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return whole(self, x + 0.01 * x.mean(dim=1, keepdim=True))

    monkeypatch.setattr(LlamaMLP, "forward", mixed)
    # A width of no other test's teacher: a capture is shared by all that have the same configuration.
    teacher = foundry.teacher("llama", num_hidden_layers=1, intermediate_size=46)
    with pytest.raises(
        SpecInvalid, match=r"teacher\.model: cannot be compiled: an earlier token's logits change"
    ) as caught:
        foundry.compile(foundry.load(teacher, FFN), tmp_path / "build")
    assert "a key of its configuration that makes attention bidirectional" in str(caught.value)
    assert not (tmp_path / "build" / "scores.safetensors").exists(), "nothing was computed for it"


def test_a_model_that_is_not_its_graph_is_refused(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the kernel that users get computed something else than the one that was captured."""
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), FFN)
    whole = LlamaMLP.forward

    def quieter(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 0.99 * whole(self, x)

    def verified(compilation: Compilation) -> list[Check]:
        monkeypatch.setattr(LlamaMLP, "forward", quieter)
        return verify_teacher(compilation)

    with pytest.raises(
        SpecInvalid, match=r"the graph of this llama, captured with sdpa attention, is not the function of"
    ):
        foundry.compile(loaded, tmp_path, stages=Stages(verify_teacher=verified))


def test_weights_that_transformers_would_not_load_are_refused(foundry: Foundry, tmp_path: Path) -> None:
    class Others:
        """The weights of another file: one matrix is off by a thousandth."""

        streamed = True

        def __init__(self, source: Any) -> None:
            self.source = source

        def get(self, name: str) -> torch.Tensor:
            weight: torch.Tensor = self.source.get(name)
            return weight * 1.001 if name.endswith("layers.1.mlp.up_proj.weight") else weight

    def verified(compilation: Compilation) -> list[Check]:
        return verify_teacher(replace(compilation, source=Others(compilation.source)))

    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), FFN)
    with pytest.raises(SpecInvalid, match="or its files are read in another way"):
        foundry.compile(loaded, tmp_path, stages=Stages(verify_teacher=verified))


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_a_model_in_the_dtype_of_its_files_runs_in_float32(foundry: Foundry, family: str) -> None:
    """As one that was loaded in float32, scales that its code computes included; afterwards it is what it was."""
    plan = foundry.plan(
        foundry.teacher(family, "bfloat16", num_hidden_layers=2), {"num_hidden_layers": 2}, dtype="bfloat16"
    )
    captured, folder, ids = plan.teacher.captured, plan.checkpoint.folder, token_ids()
    model = loaded_in(folder, captured.attention, torch.bfloat16)
    before = logits_of(model, ids)
    assert before.dtype == torch.bfloat16
    buffers = run_buffers(plan, captured.config)
    widened = InFloat32(model, captured, buffers, "cpu", pytest.fail).run(lambda _: logits_of(model, ids))
    assert torch.equal(widened, logits(load_model(folder, captured.attention), ids))
    assert torch.equal(logits_of(model, ids), before)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_student_that_cannot_generate_as_its_teacher_does_is_noticed(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RWKV's states are as wide as its residual stream, whatever its attention is: generate() fails once they differ. The
    plan refuses that; here it looks away, so that the check is alone with it."""
    monkeypatch.setattr("minitron.compiler.plan.prove.check_cached_step", lambda *arguments: None)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=96, hidden_size=48, attention_hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        context_length=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    teacher = save_teacher(tmp_path / "teacher", config)
    with pytest.raises(
        WorkError, match=r"`generation`: the teacher generates, and the student does not: generate.. fails"
    ):
        foundry.compile(foundry.load(teacher, {"hidden_size": 36}), tmp_path / "build", program=False)
    checks = Folder(tmp_path / "build").checks
    assert {name for name, one in checks.items() if not one["passed"]} == {"generation"}
