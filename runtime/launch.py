"""Starts a command once for each device of this machine, with the launcher that torchrun is made of.

The processes are those that `torchrun --standalone` would start; `world.py` sees no difference. What they say is said by
themselves; the launcher speaks for a process that was killed, and for a signal that ended all of them.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import ProcessFailure, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from minitron.runtime.interrupt import handling
from minitron.runtime.logs import without_logs
from minitron.specs.errors import ProcessesFailed, WorkError
from minitron.specs.signals import ECHO_SECONDS, LAUNCHER

_SHUTDOWN_SECONDS = 3600
"""The time that processes have to write a checkpoint after a signal; a second signal ends them before that."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl

_INTERRUPTED = 130
"""The exit code of a process that a signal has ended in order."""


def launch(arguments: Sequence[str], count: int, variables: dict[str, str] | None = None) -> None:
    """Runs `python -m minitron.cli ARGUMENTS` in `count` processes of one world, with `variables` in their environment,
    and waits for them.

    KeyboardInterrupt where a signal ended them, after they have saved what they save; WorkError where a process was
    killed; ProcessesFailed where they failed with a message of their own.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # what a compile has left there is needed by the first of them
        gc.collect()
        torch.cuda.empty_cache()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="127.0.0.1", max_restarts=0, signals_to_handle="none",
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )  # fmt: skip
    given = (variables or {}) | {LAUNCHER: str(os.getpid())}
    # Several processes of all cores each would only wait for one another.
    given |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}
    # The launcher's own messages are about processes that end, and the processes say why themselves.
    with _environment(given), _passed_on(), without_logs(logging.CRITICAL):
        try:
            elastic_launch(config, sys.executable)("-m", "minitron.cli", *arguments)
        except ChildFailedError as error:
            raise _failure(error.failures, count) from None
        except SignalException:
            raise KeyboardInterrupt from None


def end_with_launcher() -> None:
    """Makes the end of the launcher, should it be killed, a request to end for this process, so that no process goes on
    training unseen; for a process that no launcher has started it does nothing.
    """
    if LAUNCHER not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it was killed before that
        os.kill(os.getpid(), signal.SIGTERM)


def _failure(failures: dict[int, ProcessFailure], count: int) -> BaseException:
    """Returns what the launcher's command ends with. A process that was killed is the reason for whatever the others
    ended with, SIGTERM aside, which the launcher itself sends to those that are left.
    """
    codes = {rank: failure.exitcode for rank, failure in sorted(failures.items())}
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    own = [code for code in codes.values() if code > 0 and code != _INTERRUPTED]
    by_others = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    if by_others or (killed and not own):
        rank, number = next(iter((by_others or killed).items()))
        memory = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
        return WorkError(
            f"process {rank} of {count} (counted from 0) was killed by {signal.Signals(number).name}{memory}; start the same "
            "command again: it goes on from the last checkpoint"
        )
    return ProcessesFailed(max(own)) if own else KeyboardInterrupt()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _passed_on() -> AbstractContextManager[None]:
    """Passes the signals of `ENDING` on to the processes, which the launcher does on SignalException. Signals within
    seconds of each other are one request; a later one ends the wait. Ignored signals stay so.
    """
    first: list[float] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not first or now - first[0] >= ECHO_SECONDS:
            first.append(now)
            raise SignalException(f"signal {number}", signal.Signals(number))

    return handling(on_signal)
