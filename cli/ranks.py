"""What a command does differently where torchrun started several processes of it."""

from __future__ import annotations

import os

from minitron.specs.errors import UsageError


def first_process() -> bool:
    """Whether this process tells the results; the others would only repeat them."""
    return os.environ.get("RANK", "0") == "0"


def only_process(command: str) -> None:
    """UsageError where several processes would do the same work and write the same files."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UsageError(
            f"`{command}` works in one process, and torchrun started {size}; compile without torchrun, then "
            "`torchrun ... -m minitron.cli train BUILD`"
        )
