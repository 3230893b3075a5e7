"""minitron: a declarative compiler for smaller language models.

    import minitron as mt

    spec = mt.load("spec.yaml")
    plan = mt.plan(spec)            # the preview: no weights are read
    build = mt.compile(plan)        # prune, verify, write the training plan
    build.train()
    build.evaluate()

The functions do what the commands of the same names do, write the same files and raise the same errors: `UsageError`
(`SpecInvalid` with every mistake at its place) where the spec or the call is wrong, `WorkError` where the work failed.
docs/python.md is an example.

Importing `minitron` imports nothing else; torch comes with the first plan. The four packages `specs`, `compiler`, `runtime`
and `cli` stand at the top of the repository and are linked here, so that they are imported as `minitron.specs` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron.cli.interface import Build, Plan
    from minitron.specs import LoadedSpec, MinitronError, SpecError, SpecInvalid, UsageError, WorkError

__version__ = "0.1.0"

__all__ = [
    "Build",
    "LoadedSpec",
    "MinitronError",
    "Plan",
    "SpecError",
    "SpecInvalid",
    "UsageError",
    "WorkError",
    "compile",
    "load",
    "plan",
]

_HOMES = {
    "Build": "minitron.cli.interface",
    "Plan": "minitron.cli.interface",
    **dict.fromkeys(
        ("LoadedSpec", "MinitronError", "SpecError", "SpecInvalid", "UsageError", "WorkError"), "minitron.specs"
    ),
}


def load(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> LoadedSpec:
    """Reads and checks a spec: no network, no teacher, no torch.

    `overrides` replace values by their dotted path: `{"student.hidden_size": 48}`, or `["student.hidden_size=48"]` as
    `--set` takes them. SpecInvalid with all mistakes of the file; UsageError where it cannot be read.
    """
    from minitron.cli.interface import load_spec_file

    return load_spec_file(Path(path), overrides)


def plan(
    spec: LoadedSpec | str | Path,
    build: str | Path | None = None,
    *,
    device: str | None = None,
    mfu: float | None = None,
    locked: bool = False,
) -> Plan:
    """Previews a spec: every width checked against the teacher, every cost. Needs configuration and weight headers only.

    build    the folder that it would be compiled into; builds/NAME beside the spec by default
    device   devices to estimate for, such as `h200x8` or `this`; the plan then says whether everything fits
    mfu      the share of a device's peak that training reaches
    locked   refuse where the spec's lock file is missing or anything is not as it says

    SpecInvalid with everything that is wrong with the spec for this teacher, each at its place.
    """
    from minitron.cli.interface import make_plan

    return make_plan(spec, build, device=device, mfu=mfu, locked=locked)


def compile(
    spec: LoadedSpec | Plan | str | Path,
    build: str | Path | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    locked: bool = False,
    fresh: bool = False,
    quiet: bool = False,
) -> Build:
    """Scores, selects, rewrites, writes the pruned student and its training plan, verifies; returns the build.

    build     the folder; that of the plan, or builds/NAME beside the spec by default
    device    `cpu`, `cuda` or `cuda:N`; CUDA where there is one by default
    threads   CPU threads; what torch chooses by default
    locked    refuse where the spec's lock file is missing or anything is not as it says
    fresh     begin a new build: move the one that is there aside, to BUILD.1, BUILD.2, ...
    quiet     show no progress on stderr

    SpecInvalid as for `plan`; WorkError where a check of the student fails. A build that is up to date is left as it is. Scores
    of an earlier compile of the same teacher and data are used again, and a compile that was interrupted goes on where it was.
    """
    from minitron.cli.interface import compile_into

    return compile_into(spec, build, device=device, threads=threads, locked=locked, fresh=fresh, quiet=quiet)


def __getattr__(name: str) -> Any:
    """The classes of `__all__`, imported when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minitron' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
