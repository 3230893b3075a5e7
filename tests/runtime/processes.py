"""Real processes to kill and real ranks to train with.

They are forked from a server that has imported torch and transformers already, so that each costs a fraction of a second. What
runs in them must be importable: it stands here.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from minitron.specs.errors import MinitronError, WorkError
from minitron.specs.progress import Silent
from minitron.specs.signals import ENDING

Before = Callable[[], None] | None

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["processes", "minitron.runtime", "transformers.models.llama.modeling_llama", "torch.utils.tensorboard"]
)


class Told(Silent):
    """Sends a word to the parent at every step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        if amount:  # else it waits
            self.pipe.send("step")

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        return contextlib.nullcontext(self) if name == "train" else super().task(name, total, unit, done)


def _train(build: Path, pipe: Connection, before: Before) -> None:
    from minitron.runtime import train

    _work(train, build, pipe, before)


def _capture(build: Path, pipe: Connection, before: Before) -> None:
    from minitron.runtime import record

    _work(record, build, pipe, before)


def evaluate_rank(build: Path, pipe: Connection, before: Before) -> None:
    """Evaluates, and leaves beside the build how many requests this rank was given."""
    from minitron.runtime import evaluate
    from minitron.runtime.benchmarks.harness import Harness

    real, given = Harness.loglikelihood, []

    def loglikelihood(harness: Any, requests: Any, disable_tqdm: bool = True) -> Any:
        given.append(len(requests))
        return real(harness, requests)

    Harness.loglikelihood = loglikelihood  # type: ignore[method-assign]
    _work(evaluate, build, pipe, before)
    (build.parent / f"requests-{os.environ['RANK']}.txt").write_text(" ".join(map(str, given)))


def _work(command: Any, build: Path, pipe: Connection, before: Before, told: type[Told] = Told) -> None:
    torch.set_num_threads(1)
    # Under nohup the hang-up is ignored, and children inherit that: a signal that a test sends would find nothing, rightly.
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if before is not None:
        before()
    try:
        command(build, device="cpu", progress=told(pipe))
        pipe.send("done")
    except KeyboardInterrupt:
        pipe.send("interrupted")
    except MinitronError as error:
        pipe.send(f"{type(error).__name__}: {error}")


def start(build: Path, before: Before = None, work: Any = _train) -> tuple[BaseProcess, Connection]:
    """A process that trains or does other `work`, and where it says `step` at each step and at last `done`, `interrupted`
    or its error."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=work, args=(build, theirs, before), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def last_word(process: BaseProcess, pipe: Connection) -> str | None:
    """What it said at the end; None where it was killed."""
    word = None
    try:
        while True:
            word = pipe.recv()
    except EOFError:
        process.join()
    return None if word == "step" else word


def train_in_process(build: Path, before: Before = None) -> str | None:
    return last_word(*start(build, before))


def capture_in_process(build: Path, before: Callable[[], None] | None = None) -> str | None:
    return last_word(*start(build, before, _capture))


def small_shards() -> None:
    """Shards of 8 sequences of 16 tokens."""
    from minitron.runtime import teacher_logits

    teacher_logits._SHARD_TOKENS = 8 * 16, 8 * 16


def kill_during_third_shard() -> None:
    """Makes this process kill itself when its third shard is written but has not yet its name."""
    small_shards()
    from minitron.runtime import teacher_logits

    real, written = teacher_logits.save_file, []

    def save_file(arrays: Any, path: Path, metadata: Any) -> None:
        real(arrays, path, metadata=metadata)
        written.append(path)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    teacher_logits.save_file = save_file


def kill_during_second_checkpoint() -> None:
    """Makes this process kill itself when half of its second checkpoint is written."""
    from minitron.runtime import checkpoint

    real, written = checkpoint.save_file, []

    def save_file(tensors: Any, path: Path, *more: Any) -> None:
        real(tensors, path, *more)
        written.append(path)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file


def kill_at_third_step() -> None:
    """Makes this process kill itself when it has begun its third step."""
    _kill_at(2)


def kill_at_seventh_step() -> None:
    """Makes this process kill itself when it has begun its seventh step."""
    _kill_at(6)


def kill_at_twelfth_step() -> None:
    """Makes this process kill itself when it has begun its twelfth step."""
    _kill_at(11)


def _kill_at(done: int) -> None:
    from minitron.runtime import loop

    real = loop.train_step

    def train_step(run: Any, state: Any) -> Any:
        if state.step == done:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, state)

    loop.train_step = train_step


def kill_before_the_model_is_named() -> None:
    """Makes this process kill itself when the final model is written but has not yet its name."""
    from minitron.runtime import output

    real = output.model_card

    def model_card(*args: Any) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    output.model_card = model_card


def full_disk_at_second_checkpoint() -> None:
    """Makes this process find its disk full when half of its second checkpoint is written."""
    from minitron.runtime import checkpoint

    real, written = checkpoint.save_file, []

    def save_file(tensors: Any, path: Path, *more: Any) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *more)

    checkpoint.save_file = save_file


def full_disk_for_metrics() -> None:
    """Makes this process find its disk full when it writes its tenth line of metrics."""
    from minitron.runtime.metrics import MetricsLog

    real = MetricsLog.write

    def write(log: MetricsLog, figures: Any) -> None:
        if figures["step"] == 10:
            raise WorkError("metrics.jsonl could not be written: the disk is full; make room and run the command again")
        real(log, figures)

    MetricsLog.write = write  # type: ignore[method-assign]


def tokenize_early(gate: Path, cache: Path | None = None) -> None:
    """Makes shards of this process small, and has what tokenizes beside it wait at a gate; with `cache`, on a machine whose
    cache is its own.
    """
    from minitron.runtime import arrivals
    from minitron.specs.shards import writer
    from tests.runtime import gated_tokenizer

    writer.SHARD_TOKENS = 300
    arrivals.COMMAND = gated_tokenizer.COMMAND
    os.environ[gated_tokenizer.VARIABLE] = str(gate)
    if cache is not None:
        os.environ |= {"MINITRON_CACHE": str(cache), "LOCAL_RANK": "0"}


def small_blocks_checked_late() -> None:
    """Makes this process write checksums of 32 tokens, and check each when it is first read."""
    from minitron.runtime import tokens
    from minitron.specs.shards import stream

    stream.BLOCK_TOKENS, tokens._CHECKED_BYTES = 32, 0


def without_data() -> None:
    """Keeps this process from looking at data files."""
    from minitron.runtime import data, setup
    from minitron.specs.shards import writer

    def fail(*_args: Any, **_more: Any) -> Any:
        raise AssertionError("this process should not look at the data")

    data.content_hash = setup.content_hash = writer.iter_pieces = fail


def _rank(rank: int, size: int, port: int, build: Path, pipe: Connection, work: Any, before: Before) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work(build, pipe, before)


def capture_on_ranks(build: Path, size: int) -> list[str | None]:
    """What each of `size` ranks that capture said at the end."""
    return train_on_ranks(build, size, small_shards, work=_capture)


def train_on_ranks(
    build: Path | Sequence[Path], size: int, before: Before = None, on: Sequence[int] | None = None, work: Any = _train
) -> list[str | None]:
    """What each of `size` ranks said at the end. `before` is called in the ranks `on`, or in all of them; several
    builds: each rank has its own."""
    builds = [build] * size if isinstance(build, Path) else build
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe()
        then = before if on is None or rank in on else None
        process = CONTEXT.Process(target=_rank, args=(rank, size, port, builds[rank], theirs, work, then), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    return [last_word(process, pipe) for process, pipe in running]


class ToldOfSearch(Told):
    """As `Told`, of the rungs of a search."""

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        return contextlib.nullcontext(self) if name.startswith("search") else Silent.task(self, name, total, unit, done)


def search_candidates(build: Path, pipe: Connection, before: Before) -> None:
    """Carries out the rungs of a search."""
    from minitron.runtime import search

    _work(search, build, pipe, before, ToldOfSearch)


def kill_while_candidates_are_removed() -> None:
    """Makes this process kill itself when it begins to remove the first candidate that is out."""
    from minitron.runtime.search import rungs

    def rmtree(path: Path, **_: Any) -> None:
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    rungs.shutil = type("shutil", (), {"rmtree": staticmethod(rmtree)})  # type: ignore[assignment]
