"""The choice of the device to work on."""

from __future__ import annotations

import torch

from minitron.specs.errors import UsageError


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """Returns the device called `name` (`cpu`, `cuda`, `cuda:1`); None stands for CUDA where there is one, else the
    CPU. Several ranks on one machine take one GPU each.

    UsageError for a device that this machine does not have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"`{name}` is not a device; write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"minitron does not train on `{device.type}`; write cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; write --device cpu, or install a CUDA build of torch")
    count = torch.cuda.device_count()
    index = device.index if device.index is not None else local_rank
    if index >= count:
        raise UsageError(
            f"there is no cuda:{index} here, the last one is cuda:{count - 1}; start fewer processes or name another"
        )
    return torch.device("cuda", index)
