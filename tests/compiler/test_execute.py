"""The executor: a captured graph run layer by layer is the Hugging Face model, with a layer's weights at a time."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch

from minitron.compiler import Plan
from minitron.compiler.graph.executor import Feeding, Fork, Probes
from minitron.compiler.graph.streams import MemoryStreams
from minitron.compiler.weights.source import open_weights
from tests.foundry import Foundry, executor, logits, teacher_model, token_ids
from tests.models import FAMILIES


def run(plan: Plan, *batches: torch.Tensor) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    executor(plan).run(batches, output=lambda value, number: found.update({number: value}))
    return [found[number] for number in range(len(batches))]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_hugging_face_models(foundry: Foundry, family: str) -> None:
    plan = foundry.whole(family)
    batches = [token_ids(2, 24), token_ids(3, 17, seed=1), token_ids(1, 1, seed=2)]
    model = teacher_model(plan)
    for got, ids in zip(run(plan, *batches), batches, strict=True):
        torch.testing.assert_close(got, logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_bfloat16_teacher_is_run_in_float32(foundry: Foundry, family: str) -> None:
    """As transformers does with dtype=float32: the rounded weights, and no rounding after that."""
    plan = foundry.whole(family, "bfloat16")
    ids = token_ids()
    (got,) = run(plan, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits(teacher_model(plan), ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_weight_is_fetched_once_for_all_batches(foundry: Foundry, family: str) -> None:
    """Gemma's embedding is its head too, at the other end of the graph: it is not read twice either."""
    plan = foundry.whole(family)
    source, fetched = open_weights(plan.teacher.captured, plan.checkpoint), Counter[str]()

    def fetch(name: str) -> torch.Tensor:
        fetched[name] += 1
        return source.get(name)

    executor(plan, fetch).run([token_ids(seed=seed) for seed in range(4)], output=lambda value, number: None)
    assert set(fetched) == set(dict(plan.teacher.captured.model.named_parameters()))
    assert set(fetched.values()) == {1}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_no_two_matrices_are_in_memory_together(foundry: Foundry, family: str) -> None:
    """Though embedding and head are one in Gemma: logits are the same numbers as where layers stay together."""
    plan = foundry.whole(family)
    source, alive, most = open_weights(plan.teacher.captured, plan.checkpoint), list[weakref.ref[torch.Tensor]](), 0

    def fetch(name: str) -> torch.Tensor:
        nonlocal most
        weight = source.get(name).clone()
        if weight.dim() > 1:
            alive.append(weakref.ref(weight))
        most = max(most, sum(one() is not None for one in alive))
        return weight

    batches, found = [token_ids(seed=seed) for seed in range(2)], dict[int, torch.Tensor]()
    apart = executor(plan, fetch, feeding=Feeding(apart=True))
    apart.run(batches, output=lambda value, number: found.update({number: value}))
    assert most == (1 if source.streamed else most)
    assert all(torch.equal(found[i], one) for i, one in enumerate(run(plan, *batches)))
    assert apart.segments > executor(plan).segments


def test_layers_come_one_after_the_other_with_all_batches_in_each(foundry: Foundry) -> None:
    plan = foundry.whole("llama")
    seen: list[tuple[int, int]] = []
    taps = {
        end.leave: lambda value, number, layer=layer: seen.append((layer, number))  # type: ignore[misc]
        for layer, end in enumerate(plan.teacher.ends)
    }
    executor(plan).run([token_ids(), token_ids(seed=1)], taps=taps)
    assert seen == [(layer, number) for layer in range(3) for number in (0, 1)]


def test_taps_see_what_hooks_of_the_model_see(foundry: Foundry) -> None:
    plan = foundry.whole("qwen2")
    model, ids = teacher_model(plan), token_ids()
    wanted: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: wanted.append(output))
    logits(model, ids)
    got: dict[str, torch.Tensor] = {}
    taps = {end.leave: lambda value, number, name=end.leave: got.update({name: value}) for end in plan.teacher.ends}  # type: ignore[misc]
    executor(plan).run([ids], taps=taps)
    for end, value in zip(plan.teacher.ends, wanted, strict=True):
        torch.testing.assert_close(got[end.leave], value, rtol=1e-4, atol=1e-5)


def test_what_nobody_looks_at_is_not_run(foundry: Foundry) -> None:
    """With taps alone the head, which costs most where the vocabulary is large, is neither read nor run."""
    plan = foundry.whole("llama")
    source, fetched = open_weights(plan.teacher.captured, plan.checkpoint), set[str]()

    def fetch(name: str) -> torch.Tensor:
        fetched.add(name)
        return source.get(name)

    executor(plan, fetch).run([token_ids()], taps={plan.teacher.ends[-1].leave: lambda value, number: None})
    assert "lm_head.weight" not in fetched and "model.layers.2.mlp.down_proj.weight" in fetched


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_skipped_layer_is_a_layer_less(foundry: Foundry, layer: int) -> None:
    plan = foundry.whole("llama")
    model, ids = teacher_model(plan), token_ids()
    whole = logits(model, ids)
    del model.model.layers[layer]
    end, machine = plan.teacher.ends[layer], executor(plan)
    fork, got = Fork(end.entry, end.leave), dict[int, torch.Tensor]()
    probes = Probes(output=lambda value, number, lane: got.update({lane: value}), forks=[fork])
    for _ in machine.steps([ids], MemoryStreams(), probes):
        pass
    torch.testing.assert_close(got[0], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[machine.lane_of(fork)], logits(model, ids), rtol=1e-4, atol=1e-5)


def test_it_advances_once_a_batch_and_segment_whether_run_or_not(foundry: Foundry) -> None:
    plan = foundry.whole("llama")
    steps: list[int] = []
    machine = executor(plan)
    machine.run(
        [token_ids(), token_ids()], taps={plan.teacher.ends[0].leave: lambda value, number: None}, advance=steps.append
    )
    assert Counter(steps) == {0: machine.segments, 1: machine.segments}


def test_values_that_are_read_in_turn_leave_gradients_as_they_were(foundry: Foundry) -> None:
    """Two iterators side by side, one of them never read to its end: what runs afterwards can be trained."""
    plan = foundry.whole("llama", num_hidden_layers=2)
    first, second = executor(plan), executor(plan)
    batches = [token_ids(1), token_ids(1, seed=1)]
    name = next(n.name for n in plan.teacher.captured.graph.nodes if "embedding" in n.name)
    pairs = zip(
        first.values_in(0, first.start(batches), {name}),
        second.values_in(0, second.start(batches), {name}),
        strict=True,
    )
    left, right = next(pairs)
    assert torch.equal(left[name], right[name]) and torch.is_grad_enabled()
    del pairs
    assert torch.is_grad_enabled()
