"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec file.", show_default=False)]
BuildFolder = Annotated[
    Path, typer.Argument(metavar="BUILD", help="The folder that `minitron compile` wrote.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="BUILD", help="The build folder; builds/NAME beside the spec by default."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Override a value of the spec, as in student.hidden_size=48; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print markdown tables, for a pull request.")]
Full = Annotated[bool, typer.Option("--full", help="Show every width, axis, cost and device, not the summary alone.")]
DetailedExitcode = Annotated[
    bool, typer.Option("--detailed-exitcode", help="Exit with 0 when BUILD is up to date with SPEC, with 3 when not.")
]
Locked = Annotated[
    bool, typer.Option("--locked", help="Refuse to work where NAME.lock.yaml is missing or anything is not as it says.")
]
Candidate = Annotated[
    int | None,
    typer.Option("--candidate", metavar="N", min=1, help="Take this candidate of the spec's search, not the best one."),
]
Prepare = Annotated[
    bool,
    typer.Option("--prepare", help="Write the candidates of the spec's search and stop, for `minitron search BUILD`."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N; by default cuda where there is one."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin a new build: move the one that is there aside, to BUILD.1, BUILD.2, ...")
]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="N|all|none",
        help="Start one process for each of N devices of this machine; all GPUs by default, none for this process alone.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads; by default what torch chooses.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory that calibration may take on the device, as in 20GiB; by default what is free.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Start over: take up nothing that an earlier compile left.")]
Unverified = Annotated[
    bool, typer.Option("--unverified", help="Take a student whose verification is missing, failed or of other files.")
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Let `work` and `output` of training.yaml lie outside of BUILD.")
]
PlannedDevice = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="Estimate for these devices and say whether it fits: h200x8, a100, this."
    ),
]
Mfu = Annotated[
    float | None,
    typer.Option("--mfu", metavar="SHARE", help="Share of a device's peak that training reaches; 0.17 by default."),
]
Measured = Annotated[
    str | None,
    typer.Option(
        "--measured",
        metavar="BUILD[@DEVICE]",
        help="Take that share from the training in BUILD, on --device or on what stands behind @.",
    ),
]
