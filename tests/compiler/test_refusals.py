"""What the compiler refuses and no other test is about: each with a sentence that says what and, where it can, what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.compiler.capture.capture import capture
from minitron.compiler.capture.models import build_meta, canonical_names, find_layers
from minitron.compiler.roles import analysed
from minitron.compiler.roles.lm_head import check_backbone, find_head
from minitron.compiler.student.config import prove
from minitron.compiler.teacher.checkpoint import open_checkpoint
from minitron.compiler.verify.hugging_face import load_model as load_student
from minitron.compiler.weights.source import LoadedWeights, open_weights
from minitron.specs.documents import check as documents_check
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from tests.foundry import Foundry
from tests.models import save_teacher, tiny_config
from tests.specs.test_shares import side
from tests.zoo.anything import tiny


def test_a_model_that_cannot_be_traced_is_refused_with_its_reason_once() -> None:
    with pytest.raises(UsageError) as caught:
        capture(tiny_config("llama", num_hidden_layers=1, hidden_act="no-such-function"))
    words = str(caught.value)
    assert words.startswith("llama cannot be traced to a graph; KeyError: ")
    assert words.count("no-such-function") == 1 and "\n" not in words
    assert words.endswith(")") and " (modeling_llama.py:" in words


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (
            "jetmoe",
            "its code takes sizes out of the values of tensors (item in model.layers.0.self_attention.experts.router)",
        ),
        (
            "dbrx",
            "its code decides by the values of tensors what it computes, which a graph cannot hold (modeling_dbrx.py:",
        ),
    ],
)
def test_sizes_that_follow_from_data_are_refused_before_anything_is_run(family: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        capture(tiny(family))
    assert f"{family} cannot be traced to a graph; {words}" in str(caught.value)


def test_a_model_without_a_list_of_its_layers() -> None:
    config = SimpleNamespace(model_type="odd", num_hidden_layers=3)
    model = torch.nn.ModuleDict({"short": torch.nn.ModuleList([torch.nn.Identity()] * 2)})
    with pytest.raises(UsageError, match="odd: no list of 3 layers in the model"):
        find_layers(model, config)


@pytest.mark.parametrize("operator", [torch.ops.aten.relu.default, torch.ops.aten.tanh.default])
def test_logits_that_the_loss_cannot_compute(operator: Any) -> None:
    """A soft cap is c * tanh(z / c); a bare tanh is something else."""
    graph = torch.fx.Graph()
    hidden, weight = graph.placeholder("hidden"), graph.get_attr("weight")
    logits = graph.call_function(torch.ops.aten.linear.default, (hidden, weight))
    graph.output(graph.call_function(operator, (logits,)))
    model, config = SimpleNamespace(base_model_prefix="m", m=torch.nn.Module()), SimpleNamespace(model_type="odd")
    with pytest.raises(
        UsageError, match=f"odd: .*through {operator._opname}, which the distillation loss does not know"
    ):
        find_head(SimpleNamespace(graph=graph, model=model, config=config, module_of=lambda node: ""))  # type: ignore[arg-type]


class _Bare(torch.nn.Module):
    """A backbone of somebody's own."""

    def __init__(self, yielded: Any) -> None:
        super().__init__()
        self.yielded = yielded

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> Any:
        return self.yielded(input_ids)


class _WithoutCache(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (
            _Bare(lambda ids: ids),
            r"\(_Bare, `model`\) yields a Tensor without `last_hidden_state`: .*; return a BaseModelO",
        ),
        (_Bare(lambda ids: (ids,)), "yields a tuple without `last_hidden_state`"),
        (
            _WithoutCache(),
            r"cannot be called with input_ids and use_cache \(.*unexpected keyword argument 'use_cache'\)",
        ),
    ],
)
def test_a_backbone_whose_hidden_states_cannot_be_read(backbone: torch.nn.Module, words: str) -> None:
    model, config = torch.nn.ModuleDict({"model": backbone}), SimpleNamespace(model_type="odd")
    with pytest.raises(UsageError, match=f"the backbone of odd .*{words}"):
        check_backbone(SimpleNamespace(model=model, config=config, length=None), "model")  # type: ignore[arg-type]


def test_a_backbone_of_somebody_s_own_that_names_its_hidden_states() -> None:
    named, blind = _Bare(lambda ids: SimpleNamespace(last_hidden_state=ids)), _Bare(lambda ids: int(ids[0, 0]))
    for backbone in (named, blind):  # code that wants to see data cannot be asked
        model = torch.nn.ModuleDict({"model": backbone})
        check_backbone(SimpleNamespace(model=model, length=None), "model")  # type: ignore[arg-type]


def test_widths_that_transformers_cannot_build() -> None:
    teacher = SimpleNamespace(config=tiny_config("llama"), dtype=torch.float32, attention="sdpa")
    # Heads that do not divide hidden_size are not to blame where the reason is another.
    config = tiny_config("llama", hidden_act="no-such-function")
    config.num_attention_heads = 3
    with pytest.raises(UsageError, match=r"transformers cannot build llama with these widths: .*no-such-function'?$"):
        prove(teacher, config, {})  # type: ignore[arg-type]


def test_widths_that_a_configuration_refuses_when_it_is_loaded(foundry: Foundry) -> None:
    """Such a model can be built, and its weights saved; only the configuration's own check stands in the way."""
    teacher = foundry.teacher("llama", num_hidden_layers=1)
    with pytest.raises(
        SpecInvalid,
        match=r"The hidden size \(26\) is not a multiple of .* heads \(4\); write hidden_size: 24 or 28$",
    ):
        foundry.plan(teacher, {"hidden_size": 26})
    foundry.plan(teacher, {"hidden_size": 26, "num_attention_heads": 2})
    wide = foundry.teacher("llama", num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(SpecInvalid, match=r"\(6\); write num_attention_heads: 4 or 8 \(num_key_value_heads: 2 or 4\)$"):
        foundry.plan(wide, {"num_key_value_heads": 3})
    foundry.plan(wide, {"num_key_value_heads": 2})


def test_sequences_that_are_longer_than_the_teacher_knows(foundry: Foundry) -> None:
    """In calibration and in distillation, both at once."""
    data = {"text": [str(foundry.root / "corpus.txt")]}
    importance = {"data": foundry.calibration | {"sequence_length": 129}}
    distill = {"data": data, "tokens": "1B", "sequence_length": 4096}
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(
            foundry.teacher("llama", num_hidden_layers=2), {"hidden_size": 24}, importance=importance, distill=distill
        )
    assert [(error.path, error.message, error.hint) for error in caught.value.errors] == [
        (f"{block}.sequence_length", f"{length} is more than the teacher's 128 positions", "write at most 128")
        for block, length in (("importance.data", 129), ("distill", 4096))
    ]


def test_layers_that_cannot_be_told_apart_stay(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where one is to go; the reason is that of the analysis."""

    def refuse(captured: Any) -> Any:
        raise UsageError("layer 1 reads what layer 0 does not pass on")

    monkeypatch.setattr(analysed, "layer_ends", refuse)
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    foundry.plan(teacher, {"intermediate_size": 24})
    with pytest.raises(
        SpecInvalid, match=r"student: no layer can be dropped: layer 1 reads what layer 0 does not pass on"
    ):
        foundry.plan(teacher, {"num_hidden_layers": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "model", tiny_config("llama", num_hidden_layers=1))


def test_a_student_that_does_not_load_back(folder: Path) -> None:
    assert load_student(folder, "sdpa").config.hidden_size == 32
    path = folder / "model.safetensors"
    whole = load_file(path)
    less = {name: tensor for name, tensor in whole.items() if "down_proj" not in name}
    more = {"model.extra.weight": torch.ones(2), **whole}
    for tensors, first in ((less, r"model\.layers\.0\.mlp\.down_proj\.weight"), (more, r"model\.extra\.weight")):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(WorkError, match=f"does not load back whole: {first} and 0 more tensors are off"):
            load_student(folder, "sdpa")
    path.write_bytes(b"damaged")
    with pytest.raises(WorkError, match=r"cannot be loaded back by transformers: .+"):
        load_student(folder, "sdpa")


def test_a_mixture_of_experts_that_lacks_one(tmp_path: Path) -> None:
    """Whose files transformers rearranges while loading, so that names alone tell nothing."""
    folder = save_teacher(tmp_path / "moe", tiny_config("mixtral", num_hidden_layers=1))
    teacher = open_checkpoint(str(folder), None, tmp_path, weights=True)
    model = build_meta(teacher.config, torch.float32, "sdpa")
    captured: Any = SimpleNamespace(
        model=model, canonical=canonical_names(model), stored_dtype=lambda name: torch.float32
    )
    assert isinstance(open_weights(captured, teacher), LoadedWeights)
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "experts.2." not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    teacher = open_checkpoint(str(folder), None, tmp_path, weights=True)
    with pytest.raises(WorkError, match=r"experts\.\S+ \[3, .*\], and config\.json says \[4, .*tensors are missing"):
        open_weights(captured, teacher)


def test_a_held_out_share_that_leaves_a_phase_nothing(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of each phase lacks the held-out documents too; documents are held out of the training's alone."""
    monkeypatch.setattr(documents_check, "WHOLE_BYTES", 1 << 10)
    places = {number: side([str(number)], only=0.5) for number in range(20)}
    trained, held_out = (next(n for n, found in places.items() if bool(found) == below) for below in (False, True))
    for number in (trained, held_out):
        (foundry.root / f"phase-{number}.txt").write_text(str(number))
    data = {"text": [str(foundry.root / "corpus.txt")], "document": "line"}

    def plan(*names: int | str) -> None:
        files = [{"text": [f"phase-{one}.txt"]} if isinstance(one, int) else {"jsonl": [one]} for one in names]
        phases = [{"tokens": 512, "data": data} for data in files]
        distill = {"data": data, "tokens": 1024, "sequence_length": 32, "global_batch_size": 4}
        blocks: dict[str, Any] = {"distill": {**distill, "phases": phases}, "evaluate": {"held_out": {"fraction": 0.5}}}
        foundry.plan(foundry.teacher("llama"), {"intermediate_size": 24}, **blocks)

    plan(trained, trained)
    rows = ['{"text": "same"}'] * 2000
    (foundry.root / "phase-0.jsonl").write_text("\n".join([*rows[:70], "{", *rows]))
    with pytest.raises(SpecInvalid) as caught:
        plan(trained, "phase-0.jsonl")
    (error,) = caught.value.errors  # a record that is read on the way to the second side, and was not sampled
    assert error.path == "distill.phases.1.data" and "phase-0.jsonl:71: is not JSON" in error.message
    with pytest.raises(SpecInvalid) as caught:
        plan(trained, held_out)
    (error,) = caught.value.errors
    assert error.path == "evaluate.held_out.fraction"
    assert error.message.startswith("of 1 document in `text: ") and f"phase-{held_out}.txt" in error.message
    assert "none would be trained on: whole documents are chosen, by a hash; `document: paragraph`" in error.message
