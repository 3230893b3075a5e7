"""The behaviour of a command where torchrun started several processes of it."""

from __future__ import annotations

import os
from datetime import timedelta

from minitron.cli.failures import Failure
from minitron.cli.processes import results_wanted
from minitron.specs.errors import UsageError

_PATIENCE = timedelta(seconds=5)


def first_process() -> bool:
    """Tells whether this process prints the results; the others would only repeat them."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or (os.environ.get("RANK", "0") == "0" and results_wanted())


def only_process(command: str) -> None:
    """Checks that only one process runs the command. UsageError where several would do the same work and write the same
    files.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UsageError(
            f"`{command}` works in one process, and torchrun started {size}; start it without torchrun (`compile`, `capture`, "
            "`train` and `eval` work in several)"
        )


def says(failure: Failure) -> bool:
    """Tells whether this process reports its failure to the user. A failure that all processes see, such as a mistake
    in a file or a loss that is NaN, is reported once, by whichever process comes first; a failure that only one
    process sees, by that process. Consequences of another process's failure, such as a connection that it closed or
    torchrun's signal to the rest, are not reported at all.

    The processes agree through the store that torchrun keeps for them. Where the store cannot be reached, each process
    reports its own failure.
    """
    attempt = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    if os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        in_words = f"minitron/failed/{attempt}"
        if failure.follows and store.add(in_words, 0):
            return False
        first = store.add(f"minitron/said/{attempt}/{failure.lines()}", 1) == 1
        if not failure.follows:
            store.add(in_words, 1)
    except (RuntimeError, ValueError, KeyError, OSError):
        return True
    return bool(first)
