"""A step keeps a GPU busy: nothing in it makes the host wait, and its data is there before it is needed."""

from __future__ import annotations

import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.runtime import feed as feed_module
from minitron.runtime import loop
from minitron.runtime.attention import fastest_attention
from minitron.runtime.course import Course
from minitron.runtime.data import Corpus, Windows
from minitron.runtime.feed import Feed
from minitron.runtime.gradients import clip
from minitron.runtime.step import train_step
from minitron.runtime.world import World
from minitron.specs.errors import WorkError
from minitron.specs.training_plan import TrainingPlan
from tests.runtime import tiny
from tests.runtime.test_training import run

CPU = World(0, 1, torch.device("cpu"))

WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # item, float, bool, int
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
}


class Waits(TorchDispatchMode):
    """Notes from where operations are called for whose result the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket == torch.ops.aten.index and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if func in WAITS or by_mask:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.places.append(f"{Path(frames[-2].filename).name}:{frames[-2].name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss__cross_entropy": 0.3, "micro_batch_size": 1},
        {"loss__hidden_states": {"pairs": [[1, 1], [0, 0]]}},
        {"gradient_checkpointing": True},
        pytest.param(
            {"compute_dtype__cpu": "float8"},
            marks=pytest.mark.skipif(find_spec("torchao") is None, reason="no torchao"),
        ),
    ],
)
def test_nothing_in_a_step_makes_the_host_wait(build: Path, monkeypatch: pytest.MonkeyPatch, changes: Any) -> None:
    seen = Waits()

    def watched(*args: Any) -> dict[str, float]:
        with seen:
            return train_step(*args)

    monkeypatch.setattr(loop, "train_step", watched)
    run(build, tokens=64 * 3, **changes)
    # The first step's data is made where it is needed. On a CPU the loss looks at what multiplies it, where that costs nothing.
    allowed = {"feed.py:_make", "data.py:of", "products.py:scale_", "distillation.py:backward"}
    # transformers looks once in each forward whether a sequence is several: the one wait that is not ours to leave out.
    assert set(seen.places) <= allowed | {"masking_utils.py:find_packed_sequence_indices"}, seen.places


def corpus(tokens: int = 200) -> Corpus:
    return Corpus((Windows(np.arange(tokens, dtype=np.uint16), 8, None),), (1,), 0)


def course(micro: int) -> Course:
    sizes = {"tokens": 96, "sequence_length": 8, "global_batch_size": 4, "micro_batch_size": micro}
    return Course.of(TrainingPlan.model_validate(tiny.plan(**sizes)))


def test_the_next_step_is_made_while_this_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = Feed._make

    def making(self: Feed, step: int) -> Any:
        made.append(step)
        return original(self, step)

    monkeypatch.setattr(feed_module.Feed, "_make", making)
    feed = Feed([corpus()], None, CPU, course(micro=2), steps=3)
    given = feed.take(0)
    assert given.valid == 32 and [micro.input_ids_BL.shape for micro, _ in given.micro_batches] == [(2, 8)] * 2
    feed._worker.shutdown()  # waits for what was begun
    assert made == [0, 1]


def test_any_step_can_be_taken_and_none_is_made_beyond_the_last() -> None:
    feed, again = (Feed([corpus()], None, CPU, course(micro=4), steps=3) for _ in range(2))
    whole = [feed.take(step).batch.input_ids_BL for step in (0, 1, 2)]
    assert torch.equal(again.take(2).batch.input_ids_BL, whole[2])
    assert again._next is None and torch.equal(again.take(1).batch.input_ids_BL, whole[1])


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed([corpus()], None, CPU, course(micro=4), steps=3)

    def broken(samples: Any) -> Any:
        raise WorkError("the stored samples are cut short")

    feed.take(0)
    feed._worker.submit(lambda: None).result()
    object.__setattr__(feed, "corpora", [type("Broken", (Corpus,), {"batch": staticmethod(broken)})((), (1,), 0)])
    feed.take(1)
    with pytest.raises(WorkError, match="cut short"):
        feed.take(2)


def test_gradients_are_scaled_down_and_never_up() -> None:
    one = torch.nn.Parameter(torch.zeros(4))
    one.grad = torch.full((4,), 3.0)
    clip([one], 6.0, 12.0)
    assert one.grad.tolist() == [3.0] * 4
    clip([one], 6.0, None)
    assert one.grad.tolist() == [3.0] * 4
    clip([one], 6.0, 1.0)
    assert float(one.grad.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("capability", "first"), [((9, 0), True), ((8, 0), False)])
def test_hopper_asks_for_the_attention_of_cudnn(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with fastest_attention(torch.device("cuda")):
        order = list(torch._C._get_sdp_priority_order())
    assert (order[0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)) == first
    with fastest_attention(torch.device("cpu")):
        pass


def test_a_device_without_memory_is_told_in_a_sentence(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(WorkError) as error:
        run(build, micro_batch_size=2, optimizer__states="int8")
    text = str(error.value)
    assert text.startswith("the device has no memory left for a micro batch of 2 x ") and "\n" not in text
    assert "`micro_batch_size: 1`, or `gradient_checkpointing: true`" in text
    assert "begin again with `weights: bfloat16`" in text and "int8" not in text
