"""The choice of how many processes a command runs in, and their start: one for each GPU of the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

from minitron.cli import output
from minitron.specs.errors import UsageError
from minitron.specs.signals import LAUNCHER

_RESULTS = "MINITRON_RESULTS"
"""The variable that keeps the processes of a command from showing results, where the command that starts them shows
its own.
"""


def process_count(devices: str | None, device: str, named: str | None) -> int:
    """Returns how many processes of this machine are to work together; 1 for this process alone, as it is.

    `devices` is `--devices`, `device` the kind that was picked, `named` what `--device` says. Left out: one for each GPU,
    unless torchrun has started this process or `--device` names one GPU. Imports torch. UsageError for a number that is
    not possible here.
    """
    import torch

    started = os.environ.get("WORLD_SIZE", "1") != "1" or "TORCHELASTIC_RUN_ID" in os.environ
    single = named is not None and ":" in named
    found = torch.cuda.device_count() if device.startswith("cuda") else 1
    if devices is None:
        return 1 if started or single else max(1, found)
    if devices == "none":
        return 1
    if started:
        raise UsageError(f"--devices {devices}: torchrun has started this process already; leave it out")
    if devices == "all":
        wanted = max(1, found)
    elif devices.isascii() and devices.isdigit() and int(devices) > 0:
        wanted = int(devices)
    else:
        raise UsageError(f"--devices {devices}: not a number of devices; write a number, all or none")
    if single and wanted > 1:
        raise UsageError(f"--devices {devices}: --device {named} is one device; write --device cuda, or leave one out")
    if device.startswith("cuda") and wanted > found:
        raise UsageError(
            f"--devices {devices}: this machine has {found} CUDA device{'s' * (found > 1)}; write at most {found}"
        )
    return wanted


def sharing(build: Path, count: int, devices: str | None) -> int:
    """Returns the largest number of processes, up to `count`, that can share a global batch of the training in `build`
    equally. A number that the user wrote stays: training refuses it with what would do.
    """
    if count == 1 or devices not in (None, "all"):
        return count
    from minitron.runtime.plan import read_training_plan
    from minitron.specs.training_plan import divisor_within

    plan = read_training_plan(build).training()
    whole = math.gcd(plan.global_batch_size, *(phase.global_batch_size for phase in plan.phases))
    fitting = divisor_within(whole, count)
    if fitting < count:
        output.progress().message(
            f"{fitting} of {count} devices: {whole} sequences of a global batch cannot be shared equally by more"
        )
    return fitting


def start(command: str, build: Path, count: int, *options: str, results: bool = True) -> None:
    """Runs a command on a build in `count` processes. With `results` the first of them shows the command's results.
    KeyboardInterrupt, WorkError and ProcessesFailed as for `runtime.launch.launch`.
    """
    from minitron.runtime.launch import launch

    launch([command, str(build), *options, *output.given()], count, {_RESULTS: "shown" if results else "none"})


def process_options(device: str, threads: int | None, *, unverified: bool = False, outside: bool = False) -> list[str]:
    """Returns the options of a command for the processes that it starts."""
    given = ["--devices", "none", "--device", device]
    given += ["--threads", str(threads)] if threads is not None else []
    return given + ["--unverified"] * unverified + ["--allow-outside"] * outside


def launched() -> bool:
    """Tells whether a launcher of ours has started this process, which speaks for all where a signal or the end of
    another ended them.
    """
    return LAUNCHER in os.environ


def results_wanted() -> bool:
    """Tells whether the command's results are shown by its own processes."""
    return os.environ.get(_RESULTS) != "none"
