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
from minitron.compiler.graph.executor import Executor, Feeding, Place
from minitron.compiler.graph.streams import FileStreams, MemoryStreams, Streams
from minitron.compiler.importance import batches, calibrate, progress_file
from minitron.compiler.importance.batches import batches_of
from minitron.compiler.importance.calibrate import Run
from minitron.compiler.importance.progress_file import Interrupted, ProgressFile, Saved, SaveTimer
from minitron.compiler.importance.room import Room
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
    greedy: bool = False,
    run: Run | None = None,
    machine: Executor | None = None,
) -> ScoreTable:
    config = CalibrationConfig(width, DepthConfig(metric), greedy=greedy)
    run = run or a_run(plan.build)
    return calibrate.calibrate(plan.teacher, machine or executor(plan), samples, config, run)


def a_run(folder: Path, progress: Progress | None = None, key: str = "k", need_layers: bool = True, **room: Any) -> Run:
    """A calibration whose progress is kept in `folder`; `room` are values of its `Room`."""
    taken = Room(**room)
    streams: Streams = FileStreams(folder / "streams") if taken.streams == "files" else MemoryStreams()
    saved = Interrupted(folder / "partial.safetensors", key)
    return Run(need_layers, saved, progress or Silent(), taken, streams)


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


def flat(table: ScoreTable) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in table.to_tensors().items()}


ROOMS: list[dict[str, Any]] = [
    {"batch": 1, "block": 1, "lanes": 1},
    {"batch": 2, "block": 2, "lanes": 1, "resident": True},
    {"batch": 3, "ahead": True},
    {"batch": 1, "block": 4, "lanes": 3, "streams": "files"},
    {"batch": 4, "streams": "files", "ahead": True},
]


@pytest.mark.parametrize("metric", ["block_influence", "loss", "logit_mse"])
def test_the_division_of_memory_does_not_change_the_scores(foundry: Foundry, tmp_path: Path, metric: str) -> None:
    plan = foundry.whole("llama")
    whole = flat(scores(plan, metric=metric))
    for number, room in enumerate(ROOMS):
        machine = executor(plan, feeding=Feeding(room.get("resident", False), room.get("ahead", False)))
        run = a_run(tmp_path / str(number), **room)
        other = flat(scores(plan, metric=metric, run=run, machine=machine))
        assert other.keys() == whole.keys()
        for name, value in whole.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=1e-5, err_msg=name)
        assert not list((tmp_path / str(number)).glob("streams/*"))


def test_batches_that_refits_look_at() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_TOKENS", 40)
        patch.setattr(batches, "BLOCK_BYTES", 3 * 4 * 40 * 32 * 2)
        found, block = batches_of(SAMPLES, hidden=32)
    assert [tuple(batch.shape) for batch in found] == [(2, 20)] * 3 and block == 2


class Killed(Exception):
    pass


class Mortal(Silent):
    """Dies at the n-th advance of a task; remembers how much was said to be done before."""

    def __init__(self, at: int | None = None) -> None:
        self.left = at
        self.first: float | None = None
        self.done = 0.0
        self.advanced = 0.0
        self.total = 0.0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        self.total, self.done, self.advanced = total, done, 0.0
        if self.first is None:
            self.first = done
        yield self

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        self.advanced += amount
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(progress_file, "SAVE_SHARE", 1e9)


@pytest.mark.usefixtures("saving_always")
@pytest.mark.parametrize("where", ["device", "files"])
@pytest.mark.parametrize("at", [0, 7, 29, 40, 58])
def test_a_killed_calibration_goes_on_and_ends_with_the_same_scores(
    foundry: Foundry, tmp_path: Path, at: int, where: str
) -> None:
    """Both passes, with several blocks in the second one; the last step before it was killed is done again."""
    plan = foundry.whole("llama")
    room = {"batch": 1, "lanes": 4, "streams": where}
    whole = flat(scores(plan, metric="loss", run=a_run(tmp_path / "whole", **room)))
    with pytest.raises(Killed):
        scores(plan, metric="loss", run=a_run(tmp_path / "killed", Mortal(at), **room))
    calm = Mortal()
    again = flat(scores(plan, metric="loss", run=a_run(tmp_path / "killed", calm, **room)))
    # Of the second pass, blocks of 4 and of 2 batches go through 5 segments with 1, 1, 2, 3 and 4 lanes.
    steps = [1] * 30, [1] * 8 + [2] * 4 + [3] * 4 + [4] * 4 + [1] * 4 + [2] * 2 + [3] * 2 + [4] * 2
    assert calm.first == (at if at < 30 else sum(steps[1][: at - 30]))
    assert calm.done + calm.advanced == calm.total
    assert all(np.array_equal(again[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("saving_always")
def test_greedy_orders_survive_a_kill_in_the_middle_of_their_layer(foundry: Foundry, tmp_path: Path) -> None:
    plan = foundry.whole("llama")
    whole = flat(scores(plan, greedy=True, run=a_run(tmp_path / "whole", batch=1)))
    for at in (9, 16):
        with pytest.raises(Killed):
            scores(plan, greedy=True, run=a_run(tmp_path / "killed", Mortal(at), batch=1))
        again = flat(scores(plan, greedy=True, run=a_run(tmp_path / "killed", batch=1)))
        assert all(np.array_equal(again[name], value) for name, value in whole.items())
        Interrupted(tmp_path / "killed" / "partial.safetensors", "k").remove()


@pytest.mark.usefixtures("saving_always")
def test_what_is_left_of_another_calibration_is_not_taken_up(foundry: Foundry, tmp_path: Path) -> None:
    plan = foundry.whole("llama")
    with pytest.raises(Killed):
        scores(plan, token_ids(6, 20, seed=9), run=a_run(tmp_path, Mortal(20), "others", batch=1))
    calm = Mortal()
    got = flat(scores(plan, run=a_run(tmp_path, calm, "ours", batch=1)))
    assert calm.first == 0
    (tmp_path / "partial.safetensors").write_bytes(b"damaged")
    again = flat(scores(plan, run=a_run(tmp_path, key="ours", batch=1)))
    assert all(np.array_equal(got[name], value) for name, value in again.items())


def test_progress_is_saved_by_time_and_less_often_where_saving_takes_long(tmp_path: Path) -> None:
    now = [0.0]
    interrupted, room = Interrupted(tmp_path / "partial.safetensors", "k"), Room(batch=2, ahead=True, streams="files")
    file = ProgressFile(interrupted, room, SaveTimer(lambda: now[0]))
    assert not file.timer.due() and interrupted.room() is None
    now[0] = progress_file.SAVE_SECONDS
    assert file.timer.due()

    class Slow(MemoryStreams):
        def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
            now[0] += 60
            return super().saved()

    file.save(Saved("calibrate", 0, Place(1, 2), {"x": torch.ones(2)}), Slow())
    now[0] += 599
    assert not file.timer.due()
    now[0] += 1
    assert file.timer.due()
    assert interrupted.room() == room and Interrupted(interrupted.path, "another's").room() is None
    saved = file.read(MemoryStreams())
    assert saved is not None and saved.place == Place(1, 2) and torch.equal(saved.state["x"], torch.ones(2))


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
    assert scores(plan, metric="loss", run=a_run(plan.build, need_layers=False)).layers is None


def test_scores_survive_their_file(foundry: Foundry) -> None:
    table = scores(foundry.whole("qwen2"))
    again = ScoreTable.from_tensors(table.to_tensors())
    assert flat(again).keys() == flat(table).keys() and again.layers is not None
    assert all(np.array_equal(flat(again)[name], value) for name, value in flat(table).items())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_keeps_what_float32_keeps(foundry: Foundry, tmp_path: Path, family: str) -> None:
    """Of a checkpoint in bf16, as a GPU calibrates it: products in bf16, scores and accumulators in fp32. Half of each axis is
    kept; channels that change places have scores as good as equal."""
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    plan, samples = foundry.whole(family, "bfloat16", **size), token_ids(16, 96)
    wide = flat(scores(plan, samples, run=a_run(tmp_path / "wide")))
    machine = executor(plan, dtype=torch.bfloat16, fast=True)
    narrow = flat(scores(plan, samples, run=a_run(tmp_path / "narrow"), machine=machine))
    assert narrow.keys() == wide.keys() and all(value.dtype == np.float32 for value in narrow.values())
    kept = same = 0
    for name, value in wide.items():
        half = value.size // 2
        if "heads" in name or name == "layers":
            continue
        ours, theirs = (set(np.argsort(-one.reshape(-1), kind="stable")[:half]) for one in (narrow[name], value))
        kept, same = kept + half, same + len(ours & theirs)
    assert same >= 0.99 * kept
