"""`importance.selection: greedy` for experts: which can go so that what the others add changes least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler.importance import expert_elimination
from minitron.compiler.importance.expert_elimination import ExpertGram, eliminate_experts
from minitron.compiler.importance.sample_rows import SampleRows
from minitron.compiler.plan.recovery import check_eliminated_experts
from minitron.specs.errors import SpecInvalid
from tests.compiler.test_calibrate import Killed, Mortal, a_run, flat, scores
from tests.foundry import Foundry, load_model, token_ids

GREEDY = {"selection": "greedy"}
SAMPLES = token_ids(6, 20)


def drawn(seed: int, tokens: int = 60, experts: int = 6, picked: int = 2) -> torch.Tensor:
    """What every expert adds to every token, [experts, tokens, 4]; zero where the token is not sent to it."""
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(experts, tokens, 4, generator=generator, dtype=torch.float64)
    added += torch.randn(experts, 1, 4, generator=generator, dtype=torch.float64)
    chosen = torch.rand(tokens, experts, generator=generator).topk(picked).indices
    return added * torch.zeros(tokens, experts).scatter(1, chosen, 1.0).T[:, :, None]


def gram_of(added: torch.Tensor) -> torch.Tensor:
    gram = ExpertGram(len(added))
    gram.add_dense(added)
    assert gram.total is not None
    return gram.total


@pytest.mark.parametrize(("seed", "groups"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_every_step_takes_the_expert_without_which_least_is_missing(seed: int, groups: int) -> None:
    """Against the error of the sum itself, worked out anew for each candidate of each step."""
    added = drawn(seed)
    steps = eliminate_experts(gram_of(added), groups)
    assert steps.shape == ((6,) if groups == 1 else (groups, 6 // groups))
    order, gone = np.argsort(steps.reshape(-1)), list[int]()
    for one in order.tolist():
        lost = [sum(1 for other in gone if other // (6 // groups) == group) for group in range(groups)]
        candidates = [e for e in range(6) if e not in gone and lost[e // (6 // groups)] == min(lost)]
        errors = {e: float(added[[*gone, e]].sum(0).square().sum()) for e in candidates}
        assert one == min(candidates, key=lambda e: errors[e]), (errors, steps)
        gone.append(one)


def test_what_others_cancel_goes_with_them() -> None:
    """Experts 0 and 1 add the opposite: with 0 gone, 1 is missed less than 2, which adds less."""
    added = torch.zeros(4, 10, 2, dtype=torch.float64)
    added[0, :, 0], added[1, :, 0], added[2, :, 1], added[3, :, 1] = 3.0, -3.3, 3.1, 4.0
    assert eliminate_experts(gram_of(added)).tolist() == [0, 1, 2, 3]
    assert added.square().sum((1, 2)).argsort().tolist() == [0, 2, 1, 3]


def test_of_equal_experts_the_lower_ones_stay() -> None:
    assert eliminate_experts(torch.eye(4, dtype=torch.float64)).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_rows_by_expert_and_all_experts_over_all_tokens_are_one_matrix(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_elimination, "TOKENS_AT_ONCE", 7)
    added = drawn(seed)
    rows, tokens = added.abs().sum(-1).nonzero().unbind(1)
    ends = torch.bincount(rows, minlength=6).cumsum(0)
    gram = ExpertGram(6)
    for part in (tokens < 20, tokens >= 20):  # two batches
        own = torch.bincount(rows[part], minlength=6).cumsum(0)
        gram.add_rows(added[rows[part], tokens[part]], own, tokens[part] - tokens[part].min())
    assert gram.total is not None and int(ends[-1]) == 120
    torch.testing.assert_close(gram.total, gram_of(added))


# -- through the compiler -------------------------------------------------------------------------------------------------


def by_hand(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each expert adds to each token, by the modules of transformers: [experts, tokens, hidden] of each layer."""
    given: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: given.append((module, *inputs)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found = []
    for module, x, chosen, routed in given:
        added = torch.zeros(len(module.down_proj), *x.shape)
        for expert in range(len(added)):
            rows, place = torch.where(chosen == expert)
            gate, up = (x[rows] @ module.gate_up_proj[expert].T).chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * up) @ module.down_proj[expert].T
            added[expert, rows] = (out * routed[rows, place, None]).detach()
        found.append(added)
    return found


def test_the_orders_of_a_teacher(foundry: Foundry, tmp_path: Path) -> None:
    plan = foundry.whole("qwen3_moe", num_hidden_layers=2)
    table = scores(plan, SAMPLES, greedy=True, run=a_run(tmp_path, batch=2))
    for layer, added in enumerate(by_hand(load_model(plan.checkpoint.folder), SAMPLES)):
        expected = eliminate_experts(gram_of(added))
        assert table.widths["num_experts"][layer].tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "llama4_text"])
def test_orders_of_other_forms_do_not_depend_on_batches(foundry: Foundry, tmp_path: Path, family: str) -> None:
    plan = foundry.whole(family, num_hidden_layers=2)
    one, other = (
        scores(plan, SAMPLES, greedy=True, run=a_run(tmp_path / str(size), batch=size)).widths["num_experts"] for size in (1, 6)
    )  # fmt: skip
    for layer, steps in one.items():
        assert sorted(steps.reshape(-1).tolist()) == list(range(steps.size))
        assert np.array_equal(steps, other[layer])


def test_a_kill_does_not_change_them(foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.compiler.importance import progress_file

    monkeypatch.setattr(progress_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(progress_file, "SAVE_SHARE", 1e9)
    plan = foundry.whole("qwen3_moe", num_hidden_layers=2)
    whole = flat(scores(plan, greedy=True, run=a_run(tmp_path / "whole", batch=1)))
    with pytest.raises(Killed):
        scores(plan, greedy=True, run=a_run(tmp_path / "killed", Mortal(9), batch=1))
    again = flat(scores(plan, greedy=True, run=a_run(tmp_path / "killed", batch=1)))
    assert all(np.array_equal(again[name], value) for name, value in whole.items())


def test_experts_alone_need_no_refit(foundry: Foundry) -> None:
    teacher = foundry.teacher("qwen3_moe", num_hidden_layers=2)
    build = foundry.build(
        teacher, {"num_experts": 4}, program=False, importance={"data": foundry.calibration, **GREEDY}
    )
    steps = build.tensors_of("scores.safetensors")["num_experts.1"]
    assert build.document("plan.json")["selection"]["num_experts"][1] == sorted(steps.topk(4).indices.tolist())
    assert all(check["passed"] for check in build.checks.values())


SEARCH: dict[str, Any] = {
    "importance": {"data": {"text": ["corpus.txt"]}, **GREEDY},
    "distill": {"data": {"text": ["corpus.txt"], "document": "line"}, "tokens": "1M", "sequence_length": 32},
    "evaluate": {"held_out": {"fraction": "5%"}},
    "search": {"budget": {"parameters": "20K"}},
}
WORDS = "greedy keeps what is best after a refit of the projections, and none is asked for"


@pytest.mark.parametrize("student", [{"num_experts": 4, "moe_intermediate_size": 16}, {"hidden_size": 24}])
def test_the_rest_does(foundry: Foundry, student: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid, match=WORDS):
        foundry.load(foundry.teacher("qwen3_moe"), student, importance={"data": foundry.calibration, **GREEDY})


def test_proposed_shapes_narrow_the_rest_too(foundry: Foundry) -> None:
    """Beside the one number of experts; in a list of them there is nothing else."""
    blocks = SEARCH | {"importance": {"data": foundry.calibration, **GREEDY}}
    foundry.load(foundry.teacher("qwen3_moe"), {"num_experts": [4, 5]}, **blocks)
    with pytest.raises(SpecInvalid, match=WORDS):
        foundry.load(foundry.teacher("qwen3_moe"), {"num_experts": 4}, **blocks)


def test_tokens_are_not_asked_for_where_no_experts_are_dropped(
    foundry: Foundry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SampleRows, "find_tokens", lambda self, node: None)
    plan = foundry.whole("mixtral", num_hidden_layers=2)
    blocks = {**SEARCH, "recovery": {"refit": "least_squares"}}
    students: list[dict[str, Any]] = [{"intermediate_size": [24, 32]}, {"num_experts": [2, 3]}, {}]
    found = [
        list(check_eliminated_experts(foundry.load(plan.checkpoint.folder, student, **blocks), plan.teacher))
        for student in students
    ]
    assert [[one.path for one in problems] for problems in found] == [[], *[["importance.selection"]] * 2]


def test_tokens_that_the_graph_does_not_show(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family of transformers that is known hides them, so the rows are hidden here."""
    monkeypatch.setattr(SampleRows, "find_tokens", lambda self, node: None)
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(
            foundry.teacher("mixtral"), {"num_experts": 2}, importance={"data": foundry.calibration, **GREEDY}
        )  # fmt: skip
    (error,) = caught.value.errors
    assert error.path == "importance.selection" and error.hint == "write scores, or leave num_experts out"
    assert error.message.startswith(
        "the graph of this mixtral does not show which tokens the experts of layer 0 are sent"
    )
