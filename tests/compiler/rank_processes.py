"""Commands in processes that a server forks once it has imported everything: what runs in them stands here."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["minitron.compiler.compile", "minitron.cli.main", "transformers.models.llama.modeling_llama"]
)
DEADLINE = 240


def compile_in(size: int, spec: Path, build: Path) -> list[int | None]:
    """Compiles as `torchrun --nproc-per-node SIZE` does: the exit codes of all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=_compile, args=(rank, size, port, spec, build)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(DEADLINE)
        process.kill()
    return [process.exitcode for process in started]


def _compile(rank: int, size: int, port: int, spec: Path, build: Path) -> None:
    from minitron.cli.main import command_line
    from minitron.compiler.importance import batches

    torch.set_num_threads(1)
    batches.BATCH_TOKENS = 12  # so that each process has some of the few samples
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    raise SystemExit(command_line(["compile", str(spec), "-o", str(build), "--device", "cpu"]))
