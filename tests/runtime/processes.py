"""Real processes to kill and real ranks to train with.

They are forked from a server that has imported torch and transformers already, so that each costs a fraction of a second. What
runs in them must be importable: it stands here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from minitron.specs.errors import MinitronError
from minitron.specs.progress import Silent

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["processes", "minitron.runtime", "transformers.models.llama.modeling_llama", "torch.utils.tensorboard"]
)


class Told(Silent):
    """Sends a word to the parent at every step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        self.pipe.send("step")

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Any:
        return contextlib.nullcontext(self) if name == "train" else super().task(name, total, unit, done)


def _train(build: Path, pipe: Connection, before: Callable[[], None] | None) -> None:
    from minitron.runtime import train

    torch.set_num_threads(1)
    if before is not None:
        before()
    try:
        train(build, device="cpu", progress=Told(pipe))
        pipe.send("done")
    except KeyboardInterrupt:
        pipe.send("interrupted")
    except MinitronError as error:
        pipe.send(f"{type(error).__name__}: {error}")


def start(build: Path, before: Callable[[], None] | None = None) -> tuple[BaseProcess, Connection]:
    """A process that trains, and where it says `step` at each step and at last `done`, `interrupted` or its error."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_train, args=(build, theirs, before), daemon=True)
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


def train_in_process(build: Path, before: Callable[[], None] | None = None) -> str | None:
    return last_word(*start(build, before))


def kill_during_second_checkpoint() -> None:
    """Makes this process kill itself when half of its second checkpoint is written."""
    from minitron.runtime import checkpoint

    real, written = checkpoint.save_file, []

    def save_file(tensors: Any, path: Path) -> None:
        real(tensors, path)
        written.append(path)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file


def kill_before_the_model_is_named() -> None:
    """Makes this process kill itself when the final model is written but has not yet its name."""
    from minitron.runtime import output

    real = output.model_card

    def model_card(*args: Any) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    output.model_card = model_card


def _rank(rank: int, size: int, port: int, build: Path, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    _train(build, pipe, None)


def train_on_ranks(build: Path, size: int) -> list[str | None]:
    """What each of `size` ranks said at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_rank, args=(rank, size, port, build, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    return [last_word(process, pipe) for process, pipe in running]
