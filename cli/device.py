"""The options for the device, its memory and the number of threads of a command; none of these changes the results."""

from __future__ import annotations

import re

from minitron.specs.errors import UsageError
from minitron.specs.units import BYTES_UNITS, parse_quantity

# Far below what one layer of any model takes that is worth pruning: a unit was forgotten.
LEAST_MEMORY = 1 << 20


def pick_device(name: str | None) -> str:
    """Checks `name` against the devices of this machine and returns it; without a name returns `cuda` where there is
    one, else `cpu`.

    Imports torch. UsageError for a device that is unknown or not there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"--device {name}: not a device that minitron works on; write cpu, cuda or cuda:N")
    if name == "cpu":
        return name
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        raise UsageError(f"--device {name}: this machine has no CUDA device that torch can use; write --device cpu")
    if match[1] is not None and int(match[1]) >= found:
        raise UsageError(
            f"--device {name}: this machine has no such device, its last is cuda:{found - 1}; write that, or an earlier one"
        )
    return name


def memory_bytes(text: str | None) -> int | None:
    """The bytes that `--memory` names. UsageError for a text that is not a size, or a size too small to compute
    in."""
    if text is None:
        return None
    try:
        size = parse_quantity(text, BYTES_UNITS)
    except ValueError as error:
        raise UsageError(f"--memory: {error}; write a size as in 20GiB") from None
    if size < LEAST_MEMORY:
        raise UsageError(f"--memory {text}: fewer than {LEAST_MEMORY >> 20} MiB; write a size as in 20GiB")
    return size


def use_threads(threads: int | None) -> None:
    """Limits torch to `threads` threads; None leaves torch's own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
