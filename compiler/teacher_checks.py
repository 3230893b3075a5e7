"""The checks of a teacher, run once for all compiles that share its weights, this machine and these versions."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import torch

from minitron.compiler.compilation import RUN_DTYPE, Compilation, weight_hashes
from minitron.compiler.graph.names import dtype_of
from minitron.compiler.teacher.lock import versions
from minitron.compiler.verify.checks import Check, failed
from minitron.compiler.verify.run import TEACHER_CHECKS, run_teacher_checks
from minitron.compiler.verify.subject import Original
from minitron.specs import cache
from minitron.specs.atomic import write_text
from minitron.specs.builds import CONFIG
from minitron.specs.cache import entry_path, mark_used
from minitron.specs.errors import MinitronError
from minitron.specs.file_hashes import file_hash

# Part of the key of kept checks: another one where the same teacher would be checked in another way.
DEFINITION = "graph and causality"


def original_of(compilation: Compilation) -> Original:
    """The teacher that everything is held against."""
    plan = compilation.plan
    return Original(
        plan.teacher, compilation.source, compilation.buffers, compilation.settings, plan.checkpoint.folder,
        dtype_of(plan.checkpoint.dtype),
    )  # fmt: skip


def verify_teacher(compilation: Compilation) -> list[Check]:
    """Runs the checks of the teacher, before anything is computed with it."""
    return run_teacher_checks(original_of(compilation), compilation.progress)


def known_teacher(compilation: Compilation) -> list[Check]:
    """The checks of the teacher, from the cache where they passed on the same weights before."""
    place = entry_path(compilation.plan.build, cache.CHECKS, f"{_key(compilation)}.json")
    if place is not None and not compilation.work.fresh:
        found = _kept(place)
        if found is not None:
            compilation.progress.message(f"checks of the teacher: taken from {place}")
            mark_used(place)
            return found
    checks = verify_teacher(compilation)
    if place is not None and not failed(checks):
        # A cache that cannot be written to only costs the next compile its time.
        with contextlib.suppress(OSError, MinitronError):
            write_text(place, json.dumps([check.to_json() for check in checks], indent=2) + "\n")
    return checks


def _kept(place: Path) -> list[Check] | None:
    """The checks in a file; None where there is no file, where it is damaged, or where one did not pass."""
    try:
        checks = [Check(**one) for one in json.loads(place.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    return checks if checks and all(check.passed is True for check in checks) else None


def _key(compilation: Compilation) -> str:
    """A hash of everything that decides the result."""
    plan, device = compilation.plan, torch.device(compilation.device)
    checkpoint, captured = plan.checkpoint, plan.teacher.captured
    parts = (
        DEFINITION,
        repr([check.__name__ for check in TEACHER_CHECKS]),
        repr(weight_hashes(checkpoint)),
        file_hash(checkpoint.folder / CONFIG),
        (checkpoint.tied_config or checkpoint.config).to_json_string(),
        repr(sorted(checkpoint.aliases.items())),
        repr((captured.attention, captured.dtype, plan.dtype, RUN_DTYPE)),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        repr(sorted(versions().items())),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
