"""With `shuffle: {block: N}` training begins with the first shards, and learns the same as if all had been there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from minitron.runtime import record, train
from minitron.runtime.folders import claim_folders
from minitron.runtime.plan import read_training_plan
from minitron.runtime.tokens import TextEncoder, token_stream
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.errors import SpecInvalid
from minitron.specs.locks import LOCK, only_one
from minitron.specs.progress import Silent
from minitron.specs.shards.process import tokenize
from minitron.specs.shards.writer import Part, write_stream
from tests.runtime import tiny
from tests.runtime.processes import last_word, start, tokenize_early, train_in_process, train_on_ranks
from tests.runtime.tiny import read_metrics
from tests.specs.test_data_forms import megatron

BLOCK = 512
STEPS = 48
PLAN: dict[str, Any] = {
    "shuffle": {"block": BLOCK},
    "tokens": 64 * STEPS,
    "checkpoint": {"every_tokens": 64 * 5, "keep_last": 2},
    "held_out": {"data": {"text": ["../valid.txt"]}, "max_tokens": 100, "every_tokens": None},
}
"""Data of 2.7K tokens, 171 sequences, in shards of 300: the second pass begins before the end."""

FIRST_STEPS = BLOCK // 64
"""The steps of the first block; it lies in the first two shards, and the second block ends in the fourth."""


def tokenized_before(build: Path, **changes: Any) -> Path:
    """Makes all tokens that the plan names, before any training."""
    tiny.write_plan(build, **PLAN | changes)
    loaded = read_training_plan(build)
    claim_folders(loaded)
    plan, encoder = loaded.training(), TextEncoder.load(build / "student")
    for data in (plan.data, *(phase.data for phase in plan.phases if phase.data is not None)):
        source = loaded.data("data", data)
        for part in source.blend or (source,):
            token_stream(part, content_hash(part), encoder, build / "train" / "data", Silent())
    return build


@pytest.fixture(scope="module")
def whole(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tiny.Result:
    """What a training ends with whose tokens were all there."""
    root = tmp_path_factory.mktemp("whole") / "here"
    shutil.copytree(tiny_build.parent, root)
    assert train_in_process(tokenized_before(root / "build")) == "done"
    return tiny.result(root / "build")


class Gate:
    """A training whose tokenizing waits at a gate."""

    def __init__(self, build: Path) -> None:
        self.build, self.folder = build, build.parent / "gate"
        self.folder.mkdir()
        self.hook = partial(tokenize_early, self.folder)

    def close(self, shard: int) -> None:
        (self.folder / "closed").write_text(str(shard))

    def open(self) -> None:
        (self.folder / "closed").unlink()

    @property
    def stream(self) -> Path:
        """The folder of the training data's tokens; those of the held-out text are whole at once."""
        (found,) = {lock.parent for lock in self.build.glob(f"train/data/*/{LOCK}")} - {
            index.parent for index in self.build.glob("train/data/*/stream.json") if len(shards(index.parent)) == 1
        }
        return found

    def begin(self, steps: int) -> tuple[BaseProcess, Connection]:
        """Starts a training and hears of its first steps."""
        process, pipe = start(self.build, self.hook)
        for _ in range(steps):
            assert pipe.recv() == "step"
        return process, pipe

    @contextmanager
    def opened_after(self, steps: int) -> Iterator[None]:
        """Opens the gate, beside what the body does, when the metrics have so many steps and no shard is behind the gate."""
        seen: list[Any] = []
        ended: list[bool] = []

        def watch() -> None:
            wait_until(lambda: ended or len(read_metrics(self.build / "train" / "metrics.jsonl")) >= steps)
            seen.append([len(shards(self.stream)), (self.stream / "stream.json").exists()])
            self.open()

        closed = int((self.folder / "closed").read_text())
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        yield
        ended.append(True)
        watcher.join()
        ((there, all_there),) = seen
        assert 2 <= there <= closed and not all_there


@pytest.fixture
def gate(build: Path) -> Gate:
    tiny.write_plan(build, **PLAN)
    return Gate(build)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.json"))


def wait_until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def tokenizer_process(stream: Path) -> int:
    """The process that writes a stream, as its lock says."""
    words = (stream / LOCK).read_text().split()
    return int(words[words.index("(process") + 1])


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_first_steps_come_before_the_last_shard(gate: Gate, whole: tiny.Result) -> None:
    gate.close(3)
    process, pipe = gate.begin(FIRST_STEPS)
    assert len(shards(gate.stream)) == 3 and not (gate.stream / "stream.json").exists()
    assert not pipe.poll(0.5), "no step comes whose block is not whole"
    gate.open()
    assert last_word(process, pipe) == "done"
    assert len(shards(gate.stream)) == 9 and (gate.stream / "stream.json").exists()
    assert tiny.result(gate.build) == whole


def test_two_ranks_that_wait_learn_what_two_ranks_learn(gate: Gate, tiny_build: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_build.parent, tmp_path / "before")
    before = tokenized_before(tmp_path / "before" / "build")
    assert train_on_ranks(before, 2) == ["done", "done"]
    gate.close(3)
    with gate.opened_after(FIRST_STEPS):
        assert train_on_ranks(gate.build, 2, gate.hook) == ["done", "done"]
    assert tiny.result(gate.build) == tiny.result(before)


def test_machines_with_a_cache_of_their_own_tokenize_each(gate: Gate, whole: tiny.Result, tmp_path: Path) -> None:
    own = partial(tokenize_early, gate.folder, tmp_path / "own")
    gate.close(3)
    words = []

    def ranks() -> None:
        words.extend(train_on_ranks(gate.build, 2, partial(first_or, gate.hook, own)))

    with gate.opened_after(FIRST_STEPS):
        ranks()
    assert words == ["done", "done"]
    (theirs,) = (one for one in (tmp_path / "own" / "tokens").iterdir() if len(shards(one)) > 1)
    for name in shards(gate.stream):
        assert (theirs / name).read_bytes() == (gate.stream / name).read_bytes()
    losses = [line["loss"] for line in read_metrics(gate.build / "train" / "metrics.jsonl")]
    assert losses == pytest.approx([line["loss"] for line in whole[0]], rel=1e-5)


def test_a_cache_that_has_what_is_read_is_not_written_to(build: Path) -> None:
    """It may be one that cannot be written to; and what is read of a stream counts as used, whole or not."""
    cache = tokenized_before(build, held_out=None, tokens=64 * 4) / "train" / "data"
    (stream,) = cache.iterdir()
    (stream / "stream.json").unlink()
    os.utime(stream, (1e9, 1e9))
    before = cache.stat().st_mtime_ns
    assert train_on_ranks(build, 2) == ["done", "done"]
    assert cache.stat().st_mtime_ns == before
    assert stream.stat().st_mtime > 1e9


def first_or(first: Callable[[], None], other: Callable[[], None]) -> None:
    (first if os.environ["RANK"] == "0" else other)()


def test_killed_while_it_tokenizes_it_ends_with_the_same_bytes(gate: Gate, whole: tiny.Result) -> None:
    gate.close(3)
    process, pipe = gate.begin(FIRST_STEPS)
    writer, there = tokenizer_process(gate.stream), shards(gate.stream)
    inodes = [(gate.stream / name).stat().st_ino for name in there]
    assert process.pid is not None and writer != process.pid and is_running(writer)
    os.kill(process.pid, signal.SIGKILL)
    last_word(process, pipe)
    wait_until(lambda: not is_running(writer))
    assert shards(gate.stream) == there, "nothing goes on writing"
    gate.open()
    assert train_in_process(gate.build, gate.hook) == "done"
    assert tiny.result(gate.build) == whole
    assert [(gate.stream / name).stat().st_ino for name in there] == inodes, "what was there was not made again"


def test_a_tokenizer_that_is_killed_ends_the_training(gate: Gate, whole: tiny.Result) -> None:
    gate.close(3)
    process, pipe = gate.begin(FIRST_STEPS)
    os.kill(tokenizer_process(gate.stream), signal.SIGKILL)
    assert last_word(process, pipe) == (
        "WorkError: the process that tokenizes was killed by SIGKILL, as the system does where memory runs out; start the same "
        "command again: it goes on after the last whole shard"
    )
    assert (gate.build / "train" / "checkpoints" / f"step-{FIRST_STEPS:08}").is_dir(), "what was learnt is kept"
    gate.open()
    assert train_in_process(gate.build, gate.hook) == "done"
    assert tiny.result(gate.build) == whole


def test_a_signal_is_heard_while_a_step_waits(gate: Gate, whole: tiny.Result) -> None:
    gate.close(3)
    process, pipe = gate.begin(FIRST_STEPS)
    writer = tokenizer_process(gate.stream)
    process.terminate()
    assert last_word(process, pipe) == "interrupted"
    assert not is_running(writer)
    assert (gate.build / "train" / "checkpoints" / f"step-{FIRST_STEPS:08}").is_dir()
    gate.open()
    assert train_in_process(gate.build, gate.hook) == "done"
    assert tiny.result(gate.build) == whole


def test_a_disk_that_fills_up_ends_all_ranks(gate: Gate) -> None:
    gate.close(3)
    (gate.folder / "full").write_text("5")
    with gate.opened_after(FIRST_STEPS):
        words = train_on_ranks(gate.build, 2, gate.hook)
    assert (
        words[0]
        == words[1]
        == (f"WorkError: {gate.stream} could not be written: the disk is full; make room and run the command again")
    )


def rows(build: Path, last: str) -> dict[str, Any]:
    """JSON Lines of the usual text, and a last one."""
    lines = [json.dumps({"text": line}) for line in (build.parent / "train.txt").read_text().splitlines()]
    (build.parent / "rows.jsonl").write_text("\n".join([*lines, last]))
    return {"data": {"jsonl": ["../rows.jsonl"]}}


def test_a_wrong_record_in_a_late_shard_ends_all_ranks(gate: Gate) -> None:
    tiny.write_plan(gate.build, **PLAN | rows(gate.build, '{"text": 5}'))
    gate.close(3)
    with gate.opened_after(FIRST_STEPS):
        words = train_on_ranks(gate.build, 2, gate.hook)
    assert words[0] == words[1] and "rows.jsonl:121" in str(words[0]) and str(words[0]).startswith("WorkError: ")


def test_a_token_without_a_row_in_a_late_shard_ends_all_ranks(gate: Gate) -> None:
    lines = [json.dumps({"ids": list(range(2, 52))}) for _ in range(30)]
    (gate.build.parent / "ids.jsonl").write_text("\n".join([*lines, '{"ids": [7, 320, 7]}', *lines]))
    tiny.write_plan(gate.build, **PLAN | {"data": {"jsonl": ["../ids.jsonl"], "ids_field": "ids"}})
    gate.close(3)
    with gate.opened_after(FIRST_STEPS):
        words = train_on_ranks(gate.build, 2, gate.hook)
    assert words[0] == words[1] and "ids.jsonl:31 holds token 320, and the models have a vocabulary of 320" in str(
        words[0]
    )


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def blends_and_phases(build: Path) -> dict[str, Any]:
    """Text, chats and tokens of Megatron-LM in a blend, then the same text in longer sequences."""
    megatron(build.parent, [list(range(first, first + 40)) for first in range(2, 200)], "tokens")
    (build / "student" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    lines = (build.parent / "train.txt").read_text().splitlines()
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairwise(lines)]
    (build.parent / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    text = {"text": ["../train.txt"], "document": "line"}
    chat = {"jsonl": ["../chat.jsonl"], "messages_field": "messages", "train_on": "assistant"}
    short = {"tokens": 64 * 6, "sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 2, "data": None}
    longer = {"tokens": 64 * 8, "sequence_length": 32, "global_batch_size": 2, "micro_batch_size": 2, "data": text}
    return {
        "data": {
            "blend": [text | {"weight": 0.4}, chat | {"weight": 0.4}, {"megatron": ["../tokens.bin"], "weight": 0.2}]
        },
        "tokens": 64 * 14,
        "phases": [short, longer],
        "shuffle": {"block": 256},
    }


def test_blends_chats_and_phases_begin_early_too(build: Path, tiny_build: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_build.parent, tmp_path / "before")
    before = tmp_path / "before" / "build"
    assert train_in_process(tokenized_before(before, **blends_and_phases(before))) == "done"
    tiny.write_plan(build, **PLAN | blends_and_phases(build))
    gate = Gate(build)
    assert train_in_process(build, gate.hook) == "done"
    assert tiny.result(build) == tiny.result(before)


def test_a_corrected_teacher_begins_early_too(build: Path, tiny_build: Path, tmp_path: Path) -> None:
    correction = {
        "tokens": 64 * 4, "optimizer": {"lr": 3e-3, "warmup_steps": 1}, "every_tokens": 64 * 4, "output": "teacher",
        "work": "train/teacher",
    }  # fmt: skip
    changes = {"teacher_correction": correction, "tokens": 64 * 10}
    shutil.copytree(tiny_build.parent, tmp_path / "before")
    before = tokenized_before(tmp_path / "before" / "build", **changes)
    assert train_in_process(before) == "done"
    tiny.write_plan(build, **PLAN | changes)
    gate = Gate(build)
    gate.close(3)
    with gate.opened_after(FIRST_STEPS):
        assert train_in_process(build, gate.hook) == "done"
    assert tiny.result(build) == tiny.result(before)
    assert read_metrics(build / "train" / "teacher" / "metrics.jsonl")[-1]["step"] == 4


def test_stored_samples_are_of_one_order(build: Path) -> None:
    plan = PLAN | {"tokens": 64 * 12, "teacher_logits": {"sampled": 4}}
    tiny.write_plan(build, **plan)
    record(build, device="cpu", progress=Silent())
    train(build, device="cpu", progress=Silent())
    tiny.write_plan(build, **plan | {"shuffle": {"block": 600}, "work": "other", "output": "other_model"})
    with pytest.raises(SpecInvalid, match=r"were drawn with other settings \(shuffle\)"):
        train(build, device="cpu", progress=Silent())


def test_a_tokenizer_written_in_python_makes_its_tokens_first(tmp_path: Path) -> None:
    build = tiny.make_build(tmp_path, tiny.llama(24, vocabulary=384), tiny.llama(16, vocabulary=384), **PLAN)
    for folder in (build / "student", tmp_path / "teacher"):
        for file in folder.glob("tokenizer*"):
            file.unlink()
        ByT5Tokenizer().save_pretrained(folder)
    tiny.verify(build)
    tiny.write_plan(build, **PLAN | {"tokens": 64 * 10})
    train(build, device="cpu", progress=(heard := Figures()))
    assert "this tokenizer is written in Python: training begins when all its tokens are there" in heard.texts
    assert not heard.shown and len(read_metrics(build / "train" / "metrics.jsonl")) == 10


def test_a_stream_that_another_process_writes_is_left_to_it(build: Path) -> None:
    """Two builds share a cache: what one writes the other reads, and goes on with when the first one ends."""
    encoder = TextEncoder.load(build / "student")
    source = read_training_plan(build).data("data", DataSource(text=("../train.txt",), document="line"))
    part = Part(source, build / "stream")
    how, heard = replace(encoder.tokenizing(), shard_tokens=300), Figures()
    with only_one(part.folder, "tokenizing"):
        theirs = write_stream(part, how, Silent())
        next(theirs)
        ours = threading.Thread(target=tokenize, args=([[part]], how, heard))
        ours.start()
        next(theirs)
        assert shards(part.folder) == ["shard-000000.json", "shard-000001.json"] and not heard.texts
        assert ours.is_alive()
    ours.join()
    assert heard.texts[0].startswith("going on with the tokenized data after ")
    assert len(shards(part.folder)) == 9 and (part.folder / "stream.json").exists()


def test_a_short_training_reads_no_further_than_it_needs(gate: Gate) -> None:
    tiny.write_plan(gate.build, **PLAN | rows(gate.build, '{"text": 5}') | {"tokens": 64 * FIRST_STEPS})
    assert train_in_process(gate.build, gate.hook) == "done", "what is wrong stands behind its end"
    (stream,) = (one for one in (gate.build / "train" / "data").iterdir() if len(shards(one)) > 1)
    assert len(shards(stream)) == 2 and not (stream / "stream.json").exists()
    # A longer one of the same data goes on with them.
    shutil.rmtree(gate.build / "train" / "checkpoints")
    (gate.build / "train" / "finished.json").unlink()
    tiny.write_plan(gate.build, **PLAN | {"data": {"jsonl": ["../rows.jsonl"]}, "tokens": 64 * (FIRST_STEPS + 1)})
    assert train_in_process(gate.build, gate.hook) == "done"
    assert len(shards(stream)) == 4


class Figures(Silent):
    """Keeps what is shown beside the bar, and the messages."""

    def __init__(self, waiting: Callable[[int], None] = lambda steps: None) -> None:
        """`waiting` is called with the number of steps that are done, when a step waits for its data."""
        self.texts: list[str] = []
        self.shown: list[Any] = []
        self.waiting, self.steps = waiting, 0

    def message(self, text: str) -> None:
        self.texts.append(text)

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Any]:
        self.steps = 0  # the training is the last task
        yield self

    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        self.steps += amount > 0
        if not amount:
            self.waiting(self.steps)
        if "tokenized" in figures:
            self.shown.append(figures["tokenized"])


def test_it_is_shown_and_measured(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.runtime import arrivals
    from minitron.specs.shards import writer
    from tests.runtime import gated_tokenizer

    monkeypatch.setattr(writer, "SHARD_TOKENS", 300)
    monkeypatch.setattr(arrivals, "COMMAND", gated_tokenizer.COMMAND)
    monkeypatch.setenv(gated_tokenizer.VARIABLE, str(gate.folder))
    gate.close(3)
    waited: list[int] = []

    def waiting(steps: int) -> None:
        waited.append(steps)
        if steps == FIRST_STEPS and waited.count(FIRST_STEPS) == 2:  # it has slept between two looks
            gate.open()

    train(gate.build, device="cpu", progress=(heard := Figures(waiting)))
    assert [text for text in heard.texts if text.startswith("tokenized 120 documents: ")]
    documents = [int(text.split()[0]) for text in heard.shown if text is not None]
    assert documents == sorted(documents) and any(0 < n < 120 for n in documents) and heard.shown[-1] is None
    waits = [line["data_seconds"] for line in read_metrics(gate.build / "train" / "metrics.jsonl")]
    assert min(waits) >= 0 and waits[FIRST_STEPS] >= 0.1


def test_another_order_is_another_training(gate: Gate) -> None:
    gate.close(3)
    process, pipe = gate.begin(FIRST_STEPS)
    process.terminate()
    last_word(process, pipe)
    for shuffle, shown in (("all", "all"), ({"block": 1024}, '{"block": 1024}')):
        tiny.write_plan(gate.build, **PLAN | {"shuffle": shuffle})
        words = str(train_in_process(gate.build, gate.hook))
        assert (
            f'shuffle: was {{"block": 512}} when this training began and is now {shown}; write {{"block": 512}} again'
            in words
        )


def test_a_block_holds_two_sequences(build: Path) -> None:
    tiny.write_plan(build, **PLAN | {"shuffle": {"block": 31}})
    with pytest.raises(
        SpecInvalid, match=r"shuffle.block: 31 tokens hold fewer than two sequences of 16, .*write at least 32"
    ):
        train(build, device="cpu", progress=Silent())
