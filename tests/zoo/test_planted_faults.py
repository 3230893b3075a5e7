"""Models with something planted in them that an analysis may get wrong: handled or refused with its reason, never wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN
from minitron.specs.errors import SpecInvalid, UsageError
from tests.foundry import Build, Foundry, load_model, logits, token_ids
from tests.models import save_teacher, tiny_config
from tests.zoo.configs import config_of

FFN = "intermediate_size"
WIDTH = 44  # of no other test's teacher: a capture is shared by all tests that have the same configuration


@torch.library.custom_op("planted::mirrored", mutates_args=())
def mirrored(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).clone()


@mirrored.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def with_operator(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Gates of a neuron that stands elsewhere, by an operator that nobody has heard of."""
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(up * self.activation_fn(torch.ops.planted.mirrored(gate)))  # type: ignore[no-any-return]


def mirrored_gate(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The same by an operator of torch's own."""
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(up * self.activation_fn(gate.flip(-1)))  # type: ignore[no-any-return]


def interleaved(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Gate and up in turns, and not one half each."""
    both = self.gate_up_proj(x)
    return self.down_proj(both[..., 1::2] * self.activation_fn(both[..., ::2]))  # type: ignore[no-any-return]


Forward = Callable[[Any, torch.Tensor], torch.Tensor]


@pytest.fixture
def planted(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> Callable[[Forward, int], Path]:
    """A Phi-3 with another feed-forward network in it, for the compiler and for transformers alike."""

    def plant(forward: Forward, width: int) -> Path:
        monkeypatch.setattr(Phi3MLP, "forward", forward)
        return foundry.teacher("phi3", num_hidden_layers=1, intermediate_size=width)

    return plant


def passed(build: Build) -> bool:
    return all(check["passed"] for check in build.checks.values())


@pytest.mark.parametrize(
    ("forward", "width", "operator"), [(with_operator, WIDTH, "mirrored"), (mirrored_gate, WIDTH + 2, "flip")]
)
def test_an_operator_without_a_rule_keeps_its_axis_and_no_other(
    foundry: Foundry, planted: Callable[[Forward, int], Path], forward: Forward, width: int, operator: str
) -> None:
    teacher = planted(forward, width)
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(teacher, {FFN: 24})
    words = str(caught.value)
    assert f"student.{FFN}: cannot be narrowed: " in words
    assert f"({operator} in model.layers.0.mlp)" in words and f"write {width}" in words
    assert passed(foundry.build(teacher, {HIDDEN: 24, HEADS: 2, GROUPS: 1}, program=False))


def test_an_interleaved_gate_and_up(foundry: Foundry, planted: Callable[[Forward, int], Path]) -> None:
    """Neuron by neuron: both of its rows stay, or both go."""
    teacher = planted(interleaved, WIDTH + 4)
    build = foundry.build(teacher, {FFN: 20, HIDDEN: 24}, program=False)
    assert passed(build) and build.checks["masked"]["exact"]
    chosen = build.document("plan.json")["selection"]
    (neurons,), (hidden,) = chosen[FFN], chosen[HIDDEN]
    name = "model.layers.0.mlp.gate_up_proj.weight"
    rows = [row for neuron in neurons for row in (2 * neuron, 2 * neuron + 1)]
    assert torch.equal(build.tensors[name], load_file(teacher / "model.safetensors")[name][rows][:, hidden])


# -- heads that are tied ------------------------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "tied", tiny_config("qwen3", num_hidden_layers=1))


def add_head(folder: Path, change: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"] + change
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})


def test_a_head_that_is_tied_by_name_only_is_refused(foundry: Foundry, tied: Path) -> None:
    """Transformers does not tie what is different in the files: by the configuration it would be another model."""
    add_head(tied, 0.5)
    assert load_model(tied).lm_head.weight is not load_model(tied).model.embed_tokens.weight
    with pytest.raises(
        UsageError, match=r"lm_head\.weight is model\.embed_tokens\.weight.*two different tensors; .*false"
    ):
        foundry.build(tied, {FFN: 24}, program=False)


def test_what_that_refusal_says_helps(foundry: Foundry, tied: Path) -> None:
    add_head(tied, 0.5)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    build = foundry.build(tied, {FFN: 40 - 8}, program=False)
    head = load_model(build.folder / "student").lm_head.weight
    assert passed(build) and torch.equal(head, load_model(tied).lm_head.weight)


def test_a_tied_head_that_is_stored_twice(foundry: Foundry, tied: Path) -> None:
    add_head(tied, 0.0)
    build = foundry.build(tied, {HIDDEN: 24}, program=False)
    assert passed(build) and "lm_head.weight" not in build.tensors


# -- lists over layers that the configuration has let grow stale ------------------------------------------------------------


def test_entries_of_layers_that_are_not_there(foundry: Foundry, tmp_path: Path) -> None:
    """Four entries, three layers: transformers does not mind. The second and the third stay with their layers."""
    teacher = save_teacher(tmp_path / "long", config_of("smollm3"))
    config = json.loads((teacher / "config.json").read_text())
    whole = logits(load_model(teacher), token_ids())
    (teacher / "config.json").write_text(json.dumps(config | {"no_rope_layers": [1, 0, 1, 0]}))
    assert torch.equal(logits(load_model(teacher), token_ids()), whole)
    build = foundry.build(teacher, {"layers": {"drop": [0]}}, program=False, importance=None)
    assert passed(build) and build.config["no_rope_layers"] == [0, 1]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("gemma2", "layer_types", ["sliding_attention"] * 4), ("smollm3", "no_rope_layers", [1, 0])],
)
def test_lists_that_transformers_cannot_work_with(
    foundry: Foundry, tmp_path: Path, family: str, key: str, value: list[Any]
) -> None:
    teacher = save_teacher(tmp_path / family, config_of(family))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(SpecInvalid, match=r"teacher\.model: .*cannot be (read by transformers|traced to a graph)"):
        foundry.plan(teacher, {"layers": {"drop": [0]}})
