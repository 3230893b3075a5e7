"""What the backward pass computes again: the same gradients, less to keep."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.runtime import setup, train
from minitron.runtime.models import LanguageModel
from minitron.runtime.recomputation import recompute
from minitron.specs.attention_modules import attention_of
from minitron.specs.errors import Refused
from minitron.specs.progress import Silent
from minitron.specs.training_plan import HeadPlan
from tests.runtime import tiny

HEAD = HeadPlan(backbone="model", module="lm_head", weight="lm_head.weight", bias=None, scale=1.0, softcap=None)


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(tiny.llama(32)).train(), HEAD, "model.layers")


def kept(what: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a forward pass keeps for the backward pass, and the gradients."""
    one, bytes_of = model(), dict[int, int]()
    recompute(one, what)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in one.module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = one.hidden_states(torch.arange(64).reshape(2, 32))
    size = sum(size for place, size in bytes_of.items() if place not in weights)
    states.square().sum().backward()  # type: ignore[no-untyped-call]
    return size, {name: p.grad for name, p in one.module.named_parameters() if p.grad is not None}


def test_less_is_kept_and_the_gradients_are_the_same() -> None:
    (whole, plain), (attention, one), (layers, two) = (kept(what) for what in (False, "attention", True))
    assert layers < attention < 0.8 * whole
    for other in (one, two):
        assert other.keys() == plain.keys()
        assert all(torch.equal(other[name], plain[name]) for name in plain)


def test_without_gradients_nothing_is_wrapped() -> None:
    one = model()
    recompute(one, "attention")
    calls: list[bool] = []
    (module,) = attention_of(one.module.model.layers[0])
    module.q_proj.register_forward_hook(lambda *_: calls.append(True))
    with torch.no_grad():
        one.hidden_states(torch.arange(8).reshape(1, 8))
    assert calls == [True]


def test_training_learns_the_same(build: Path, tmp_path: Path) -> None:
    found = []
    for number, what in enumerate((False, "attention")):
        folder = tmp_path / str(number)
        shutil.copytree(build.parent, folder)
        tiny.write_plan(folder / "build", gradient_checkpointing=what, tokens=64 * 4)
        train(folder / "build", device="cpu", progress=Silent())
        found.append([line["loss"] for line in tiny.read_metrics(folder / "build" / "train" / "metrics.jsonl")])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_layers_without_attention_of_their_own() -> None:
    one = model()
    for layer in one.module.model.layers:
        del layer.self_attn.layer_idx
    with pytest.raises(Refused, match="no layer of this model has an attention module of its own; write true or false"):
        recompute(one, "attention")


def test_teacher_and_student_are_compiled(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling itself is torch's part; here it is seen which models are asked for."""
    compiled: list[int] = []
    monkeypatch.setattr(setup, "compile_layers", lambda one: compiled.append(one.width))
    tiny.write_plan(build, compile=True, tokens=64)
    train(build, device="cpu", progress=Silent())
    assert compiled == [24, 16]
