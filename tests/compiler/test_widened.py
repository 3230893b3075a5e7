"""Stand-ins for the parameters of a model that runs in float32: no two are in memory, and the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.compiler import make_plan
from minitron.compiler.compilation import run_buffers
from minitron.compiler.verify import widened
from minitron.compiler.verify.hugging_face import NotRunnable, load_model, logits_of
from minitron.compiler.verify.widened import InFloat32, StandIn
from minitron.specs.progress import Silent
from tests.foundry import Foundry, logits, token_ids
from tests.foundry import load_model as in_one_piece
from tests.models import FAMILIES


class Told(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_one_parameter_at_a_time(
    foundry: Foundry, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with all of them, which is what is done where a model does not run so."""
    plan = foundry.whole(family, "bfloat16")
    captured, ids = plan.teacher.captured, token_ids()
    model = load_model(plan.checkpoint.folder, captured.attention, torch.bfloat16)
    made: list[int] = []
    whole = StandIn.whole
    monkeypatch.setattr(StandIn, "whole", lambda self: made.append(self.numel()) or whole(self))
    wide = InFloat32(model, captured, run_buffers(plan, captured.config), "cpu", pytest.fail)
    got = wide.run(lambda _: logits_of(model, ids))
    wanted = logits(in_one_piece(plan.checkpoint.folder, captured.attention), ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert {value.dtype for value in model.parameters()} <= {torch.bfloat16, torch.float32}
    assert not any(isinstance(value, StandIn) for value in model.parameters())
    assert made, "stand-ins were read"


@pytest.mark.parametrize("reads", ["data_ptr", "untyped_storage"])
def test_code_that_reads_bytes_runs_with_whole_parameters_and_that_is_said_once(
    foundry: Foundry, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    plan = foundry.whole("llama", "bfloat16")
    captured, ids = plan.teacher.captured, token_ids()
    model = load_model(plan.checkpoint.folder, captured.attention, torch.bfloat16)
    kinds: list[type] = []
    said: list[str] = []
    forward = type(model.model.norm).forward

    def looks_at_bytes(self: Any, x: torch.Tensor) -> torch.Tensor:
        kinds.append(type(self.weight))
        assert getattr(self.weight, reads)()
        return forward(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", looks_at_bytes)
    wide = InFloat32(model, captured, run_buffers(plan, captured.config), "cpu", said.append)
    assert wide.note == ""
    for _ in range(2):
        got = wide.run(lambda _: logits_of(model, ids))
        assert torch.equal(got, logits(in_one_piece(plan.checkpoint.folder, captured.attention), ids))
    assert kinds[0] is StandIn and StandIn not in kinds[1:], "nor is it tried again"
    cost = f"all parameters in float32 in memory at once, {4 * sum(one.numel() for one in model.parameters()):,} bytes"
    place = "LlamaRMSNorm (model.layers.0.input_layernorm)"
    assert said == [
        f"verify: {place} reads parameters past torch's operations (it loads, but does not run in transformers: a stand-in "
        f"has no bytes), so the model of transformers runs on the CPU with {cost}"
    ]
    assert wide.note == f"; with {cost}, because {place} reads them past torch's operations"


def test_a_report_tells_what_whole_parameters_cost(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the checks that begin with them, of the teacher and of the student, and on the terminal."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward = LlamaRMSNorm.forward

    def looks_at_bytes(self: Any, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.data_ptr()
        return forward(self, x)  # type: ignore[no-any-return]

    loaded = foundry.load(foundry.teacher("llama", "bfloat16"), {"intermediate_size": 24}, dtype="bfloat16")
    plan = make_plan(loaded, build=tmp_path / "build", weights=True)  # before: a capture reads no bytes
    monkeypatch.setattr(LlamaRMSNorm, "forward", looks_at_bytes)
    told = Told()
    build = foundry.compile(loaded, tmp_path / "build", told, program=False, plan=plan)
    for name in ("teacher", "reload"):
        assert "; with all parameters in float32 in memory at once, " in build.checks[name]["detail"]
    assert len([line for line in told.lines if "past torch's operations" in line]) == 2, "once for each of the models"


def test_a_model_with_an_error_of_its_own_is_not_run_again(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = foundry.whole("llama", "bfloat16")
    captured = plan.teacher.captured
    model = load_model(plan.checkpoint.folder, captured.attention, torch.bfloat16)
    calls: list[int] = []

    def fails(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("4x8 and 6x8")

    monkeypatch.setattr(type(model.model.norm), "forward", fails)
    with pytest.raises(NotRunnable, match="it loads, but does not run in transformers: 4x8 and 6x8"):
        InFloat32(model, captured, {}, "cpu", pytest.fail).run(lambda _: logits_of(model, token_ids()))
    assert calls == [1]
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("experts"), AssertionError()])
def test_errors_that_whole_parameters_would_not_mend_are_raised(
    foundry: Foundry, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = foundry.whole("llama", "bfloat16")
    captured = plan.teacher.captured
    model = load_model(plan.checkpoint.folder, captured.attention, torch.bfloat16)

    def fails(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(type(model.model.norm), "forward", fails)
    with pytest.raises(type(error)):
        InFloat32(model, captured, {}, "cpu", pytest.fail).run(lambda _: logits_of(model, token_ids()))


def test_a_stand_in_is_read_in_parts_where_parts_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    file = torch.randn(6, 4, 3).bfloat16()
    one = StandIn.of(file, torch.bfloat16, "cpu")
    assert (one.dtype, one.shape, one.device.type) == (torch.float32, file.shape, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "whole", None)
        assert torch.equal(one[2], file[2].float())
        assert torch.equal(one[torch.tensor([1, 4])], file[[1, 4]].float())
        ids = torch.tensor([[0, 3]])
        table = StandIn.of(file[:, :, 0], torch.bfloat16, "cpu")
        assert torch.equal(torch.nn.functional.embedding(ids, table), file[:, :, 0][ids].float())
    assert torch.equal(one.transpose(0, 1), file.transpose(0, 1).float())
    assert torch.equal(torch.ones(2, 4) @ one[0], torch.ones(2, 4) @ file[0].float())
    assert widened.StandIn is StandIn and type(one + 1) is torch.Tensor
