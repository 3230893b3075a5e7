"""Stand-ins for the parameters of a model that runs in float32: no two are in memory, and the numbers are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron.compiler.compilation import run_buffers
from minitron.compiler.verify import widened
from minitron.compiler.verify.hugging_face import NotRunnable, load_model, logits_of
from minitron.compiler.verify.widened import StandIn, run_in_float32
from tests.foundry import Foundry, logits, token_ids
from tests.foundry import load_model as in_one_piece
from tests.models import FAMILIES


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
    got = run_in_float32(model, captured, run_buffers(plan, captured.config), "cpu", lambda _: logits_of(model, ids))
    wanted = logits(in_one_piece(plan.checkpoint.folder, captured.attention), ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert {value.dtype for value in model.parameters()} <= {torch.bfloat16, torch.float32}
    assert not any(isinstance(value, StandIn) for value in model.parameters())
    assert made, "stand-ins were read"


def test_code_that_reads_bytes_runs_with_whole_parameters(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = foundry.whole("llama", "bfloat16")
    captured, ids = plan.teacher.captured, token_ids()
    model = load_model(plan.checkpoint.folder, captured.attention, torch.bfloat16)
    kinds: list[type] = []
    forward = type(model.model.norm).forward

    def looks_at_bytes(self: Any, x: torch.Tensor) -> torch.Tensor:
        kinds.append(type(self.weight))
        assert self.weight.data_ptr()
        return forward(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", looks_at_bytes)
    got = run_in_float32(model, captured, run_buffers(plan, captured.config), "cpu", lambda _: logits_of(model, ids))
    assert kinds[0] is StandIn and StandIn not in kinds[1:]
    assert torch.equal(got, logits(in_one_piece(plan.checkpoint.folder, captured.attention), ids))


def test_a_model_that_runs_in_neither_way_says_so(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = foundry.whole("llama", "bfloat16")
    captured = plan.teacher.captured
    model = load_model(plan.checkpoint.folder, captured.attention, torch.bfloat16)

    def fails(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("4x8 and 6x8")

    monkeypatch.setattr(type(model.model.norm), "forward", fails)
    with pytest.raises(NotRunnable, match="it loads, but does not run in transformers: 4x8 and 6x8"):
        run_in_float32(model, captured, {}, "cpu", lambda _: logits_of(model, token_ids()))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


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
