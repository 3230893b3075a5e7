"""The error message for a device that has too little memory for a compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minitron.specs.errors import WorkError

# A word in torch's error for host memory that could not be had, which has no class of its own.
_OF_HOST = "DefaultCPUAllocator"


@contextmanager
def told_in_a_sentence(device: str, *, calibrates: bool = True) -> Iterator[None]:
    """Turns an out-of-memory error into a WorkError that names what takes less memory than the work on `device` did."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise _error(device, calibrates) from None
    except MemoryError:
        raise _error("cpu", calibrates) from None
    except RuntimeError as error:
        if _OF_HOST not in str(error):
            raise
        raise _error("cpu", calibrates) from None


def _error(device: str, calibrates: bool) -> WorkError:
    on_host = torch.device(device).type == "cpu"
    ways = ["make memory free"]
    if calibrates:
        ways.append("let calibration take less with `minitron compile --memory 8GiB`, say")
    if not on_host:
        ways.append("write --device cpu")
    where = "this machine" if on_host else f"the device {device}"
    return WorkError(f"{where} has no memory left; {', or '.join(ways)}")
