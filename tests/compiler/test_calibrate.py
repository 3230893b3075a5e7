"""Importance scores: what plain Hugging Face hooks yield, however the samples are cut and whenever it is killed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler import Plan
from minitron.compiler.importance import batches, calibrate
from minitron.compiler.importance.batches import batches_of
from minitron.compiler.importance.scores import Aggregation, ScoreTable, WidthConfig
from minitron.compiler.importance.taps import CalibrationConfig, DepthConfig
from minitron.specs.progress import Progress, Silent, Task
from tests.foundry import Foundry, executor, logits, teacher_model, token_ids

SAMPLES = token_ids(6, 20)
# Where each family keeps what is scored, inside a layer: the norms whose outputs attention and MLP read, and the
# projections whose inputs are the heads and the neurons.
PLACES: dict[str, tuple[tuple[str, str], str, str]] = {
    "llama": (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj"),
    "mistral": (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": (("input_layernorm", "pre_feedforward_layernorm"), "self_attn.o_proj", "mlp.down_proj"),
    "phi3": (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": (("input_layernorm", "post_attention_layernorm"), "attention.dense", "mlp.dense_4h_to_h"),
    "mixtral": (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", ""),
}


def scores(
    plan: Plan,
    samples: torch.Tensor = SAMPLES,
    *,
    width: WidthConfig = WidthConfig(),
    metric: Any = "block_influence",
    need_layers: bool = True,
    partial: Path | None = None,
    progress: Progress | None = None,
    key: str = "k",
) -> ScoreTable:
    return calibrate.calibrate(
        plan.teacher,
        executor(plan),
        samples,
        CalibrationConfig(width, DepthConfig(metric)),
        need_layers=need_layers,
        saved=calibrate.Interrupted(partial or plan.build / "partial.safetensors", key),
        progress=progress or Silent(),
    )


def layers_of(plan: Plan, model: Any) -> Any:
    return model.get_submodule(plan.teacher.captured.layer_path)


def hooked(plan: Plan, samples: torch.Tensor = SAMPLES) -> dict[str, torch.Tensor]:
    """name -> [samples, tokens, channels], by running the model a sample at a time with forward hooks."""
    norms, attention, mlp = PLACES[plan.teacher.captured.config.model_type]
    model = teacher_model(plan)
    found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found[name].append(output[0] if isinstance(output, tuple) else output)

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found[name].append(args[0] if args else kwargs["hidden_states"])

    for i, layer in enumerate(layers_of(plan, model)):
        for norm in norms:
            layer.get_submodule(norm).register_forward_hook(keep(f"norm.{i}.{norm}"))
        layer.get_submodule(attention).register_forward_pre_hook(keep_input(f"heads.{i}"), with_kwargs=True)
        if mlp:
            layer.get_submodule(mlp).register_forward_pre_hook(keep_input(f"mlp.{i}"), with_kwargs=True)
        layer.register_forward_pre_hook(keep_input(f"in.{i}"), with_kwargs=True)
        layer.register_forward_hook(keep(f"out.{i}"))
    for sample in samples:
        logits(model, sample[None])
    return {name: torch.cat(values).double() for name, values in found.items()}


def aggregate(value: torch.Tensor, sequence: Aggregation = "mean", batch: Aggregation = "l2") -> torch.Tensor:
    """The score of each channel of [samples, tokens, channels], written out."""
    value = value.abs()
    per_sample = {
        "mean": value.mean(1),
        "l2": (value**2).sum(1).sqrt(),
        "var": ((value - value.mean(1, keepdim=True)) ** 2).mean(1),
    }[sequence]
    return {
        "mean": per_sample.mean(0),
        "l2": (per_sample**2).sum(0).sqrt(),
        "var": ((per_sample - per_sample.mean(0)) ** 2).mean(0),
    }[batch]


def close(got: Any, wanted: torch.Tensor, rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(got), wanted.numpy(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("family", PLACES)
def test_scores_are_those_of_plain_hooks(foundry: Foundry, family: str) -> None:
    """Minitron (arXiv 2407.14679, 2.2): hidden channels from the norms, heads and neurons from the output projections."""
    plan = foundry.whole(family)
    got, values = scores(plan), hooked(plan)
    norms = [aggregate(value) for name, value in values.items() if name.startswith("norm.")]
    assert len(norms) == 2 * plan.teacher.captured.layer_count
    close(got.hidden, torch.stack(norms).sum(0))
    for layer in range(plan.teacher.captured.layer_count):
        site = plan.teacher.roles.heads[layer]
        channels = aggregate(values[f"heads.{layer}"])
        close(got.heads[layer], channels.reshape(site.groups, site.repeats, -1).norm(dim=-1))
        if f"mlp.{layer}" in values:
            close(got.widths["intermediate_size"][layer], aggregate(values[f"mlp.{layer}"]))
    entered = torch.stack([values[f"in.{i}"] for i in range(plan.teacher.captured.layer_count)])
    left = torch.stack([values[f"out.{i}"] for i in range(plan.teacher.captured.layer_count)])
    close(got.layers, 1 - torch.nn.functional.cosine_similarity(entered, left, dim=-1).mean((1, 2)), rtol=1e-3)


@pytest.mark.parametrize("batch", ["l2", "mean", "var"])
@pytest.mark.parametrize("sequence", ["l2", "mean", "var"])
def test_every_aggregation(foundry: Foundry, sequence: Aggregation, batch: Aggregation) -> None:
    plan = foundry.whole("llama")
    got, values = scores(plan, width=WidthConfig(batch, sequence)), hooked(plan)
    close(got.widths["intermediate_size"][1], aggregate(values["mlp.1"], sequence, batch), rtol=1e-3)


@contextmanager
def cut(batch_tokens: int, block_bytes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_TOKENS", batch_tokens)
        patch.setattr(batches, "BLOCK_BYTES", block_bytes)
        yield


def flat(table: ScoreTable) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in table.to_tensors().items()}


@pytest.mark.parametrize("metric", ["block_influence", "loss", "logit_mse"])
def test_batches_and_blocks_do_not_change_the_scores(foundry: Foundry, metric: str) -> None:
    plan = foundry.whole("llama")
    whole = flat(scores(plan, metric=metric))
    for batch_tokens, block_bytes in ((20, 1), (40, 1), (60, 1 << 30), (20, 3 * 3 * 4 * 20 * 32)):
        with cut(batch_tokens, block_bytes):
            other = flat(scores(plan, metric=metric))
        assert other.keys() == whole.keys()
        for name, value in whole.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=1e-5, err_msg=name)


def test_a_block_holds_as_many_batches_as_fit() -> None:
    with cut(40, 3 * 4 * 40 * 32 * 2):
        batches, block = batches_of(SAMPLES, hidden=32)
    assert [tuple(batch.shape) for batch in batches] == [(2, 20)] * 3 and block == 2
    with cut(1, 1):  # however little there is room for: at least a sample, at least a batch
        batches, block = batches_of(SAMPLES, hidden=32)
    assert len(batches) == 6 and block == 1


class Killed(Exception):
    pass


class Mortal(Silent):
    """Dies at the n-th advance of a task; remembers how much was said to be done before."""

    def __init__(self, at: int | None = None) -> None:
        self.left = at
        self.done = 0.0
        self.advanced = 0.0
        self.total = 0.0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        self.total, self.done, self.advanced = total, done, 0.0
        yield self

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        self.advanced += amount
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.mark.parametrize("at", [0, 7, 13, 20, 27])
def test_a_killed_calibration_goes_on_and_ends_with_the_same_scores(foundry: Foundry, tmp_path: Path, at: int) -> None:
    plan = foundry.whole("llama")
    partial = tmp_path / "partial.safetensors"
    with cut(20, 1):
        whole, calm = flat(scores(plan, partial=partial)), Mortal()
        with pytest.raises(Killed):
            scores(plan, partial=partial, progress=Mortal(at))
        again = flat(scores(plan, partial=partial, progress=calm))
    segments = executor(plan).segments
    assert calm.done == at // segments * segments, "whole blocks are not run again"
    assert calm.done + calm.advanced == calm.total
    assert all(np.array_equal(again[name], value) for name, value in whole.items())
    assert not partial.exists()


def test_what_is_left_of_another_calibration_is_not_taken_up(foundry: Foundry, tmp_path: Path) -> None:
    plan, partial = foundry.whole("llama"), tmp_path / "partial.safetensors"
    with cut(20, 1):
        with pytest.raises(Killed):
            scores(plan, token_ids(6, 20, seed=9), partial=partial, progress=Mortal(20), key="others")
        calm = Mortal()
        got = flat(scores(plan, partial=partial, progress=calm, key="ours"))
        assert calm.done == 0
        partial.write_bytes(b"damaged")
        assert all(np.array_equal(got[n], v) for n, v in flat(scores(plan, partial=partial, key="ours")).items())


def without_layer(plan: Plan, layer: int) -> Any:
    model = teacher_model(plan)
    del layers_of(plan, model)[layer]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for i, kind in enumerate(model.config.layer_types) if i != layer]
    model.config.num_hidden_layers -= 1
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_harm_of_dropping_a_layer_is_that_of_a_model_without_it(foundry: Foundry, family: str) -> None:
    plan = foundry.whole(family)

    def loss(values: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(values[:, :-1].flatten(0, 1), SAMPLES[:, 1:].flatten()))

    whole = logits(teacher_model(plan), SAMPLES)
    without = [logits(without_layer(plan, i), SAMPLES) for i in range(plan.teacher.captured.layer_count)]
    close(scores(plan, metric="loss").layers, torch.tensor([loss(one) - loss(whole) for one in without]), rtol=1e-3)
    mse = torch.tensor([float((one - whole).square().mean()) for one in without])
    close(scores(plan, metric="logit_mse").layers, mse, rtol=1e-3)


def test_layers_are_not_removed_one_by_one_where_nobody_asks(foundry: Foundry) -> None:
    plan = foundry.whole("llama")
    assert scores(plan, metric="loss", need_layers=False).layers is None


def test_scores_survive_their_file(foundry: Foundry) -> None:
    table = scores(foundry.whole("qwen2"))
    again = ScoreTable.from_tensors(table.to_tensors())
    assert flat(again).keys() == flat(table).keys() and again.layers is not None
    assert all(np.array_equal(flat(again)[name], value) for name, value in flat(table).items())
