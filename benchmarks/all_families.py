"""Tries every family of transformers' causal language models, and prints for each axis right, refused or failed.

    python benchmarks/all_families.py [FAMILY ...] [--plan] [--seconds 300] [--log FILE] [--document FILE]

All axes are narrowed together, and one by one where that does not pass.

right: a tiny random model of the family was compiled and passed all checks; planned: with `--plan`, which stops there;
refused: with a sentence, in the plan; failed: a check did not pass, or anything else was raised: a bug. A family of which no
tiny configuration can be made is left out and named. The command ends with 1 where anything failed. Families that `--log` has
an outcome of are not tried again: a run that was stopped goes on where it was. `--document` writes the families that have no
row in the table of docs/architectures.md into its last section.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RIGHT, PLANNED, REFUSED, FAILED, LEFT_OUT = "right", "planned", "refused", "failed", "left out"
Found = list[tuple[str, str, str]]  # (axis or nothing, outcome, reason)


def families() -> list[str]:
    """The model types that transformers' mapping of causal language models has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _job(job: tuple[str, bool, float]) -> tuple[str, Found]:
    return job[0], examine(*job)


def examine(family: str, plan_only: bool, seconds: float) -> Found:
    """(axis or nothing, outcome, reason) for everything that was tried; no axis is begun after `seconds`."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return list(_tried(family, Path(folder), plan_only, time.monotonic() + seconds))


def _tried(family: str, folder: Path, plan_only: bool, end: float) -> Iterator[tuple[str, str, str]]:
    from benchmarks.architectures import narrower, reason
    from minitron.specs.blocks.student import Student
    from minitron.specs.errors import UsageError
    from tests.foundry import Apprentice, Foundry
    from tests.models import save_teacher
    from tests.zoo.anything import layers_of, tiny

    foundry = Foundry(folder, Apprentice())
    try:
        config = tiny(family)
        layers = layers_of(config)
        teacher = save_teacher(folder / family, config)
    except Exception as error:  # the family wants other keys: nothing of ours
        yield "", LEFT_OUT, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return
    try:
        plan = foundry.plan(teacher, {"num_hidden_layers": layers})
    except UsageError as error:
        yield "", REFUSED, reason(error)
        return
    except Exception as error:
        yield "", FAILED, _where(error)
        return
    asked: dict[str, tuple[object, str]] = {}
    for status in plan.targets.statuses:
        if status.axis not in Student.model_fields or status.teacher == narrower(status.axis, status.teacher):
            continue
        if status.status == "refused":
            yield status.axis, REFUSED, status.reason
        else:
            asked[status.axis] = narrower(status.axis, status.teacher), status.status

    def build(student: Mapping[str, object]) -> None:
        if plan_only:
            foundry.plan(teacher, student)
        else:
            foundry.build(teacher, student, program=False)

    done = PLANNED if plan_only else RIGHT
    if len(asked) > 1:
        try:
            build({axis: width for axis, (width, _) in asked.items()})
            yield from ((axis, done, how) for axis, (_, how) in asked.items())
            return
        except Exception:  # which of them it is, and whether it is a refusal, one by one tells
            pass
    for axis, (width, how) in asked.items():
        if time.monotonic() > end:
            yield axis, LEFT_OUT, "no time was left"
            continue
        try:
            build({axis: width})
            yield axis, done, how
        except UsageError as error:
            yield axis, REFUSED, reason(error)
        except Exception as error:
            yield axis, FAILED, _where(error)


def _where(error: Exception) -> str:
    """Describes an error, with the last line of this project that it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "minitron" in frame.filename]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def render(found: Mapping[str, Found]) -> str:
    """The section on families that the table does not have: a line for each, its axes by outcome, the reasons below."""
    from tests.zoo.configs import EVERY

    numbers: dict[str, int] = {}

    def cell(axes: Found, outcome: str) -> str:
        return ", ".join(
            axis
            + (f"<sup>{numbers.setdefault(why, len(numbers) + 1)}</sup>" if outcome == REFUSED else "")
            + (" (approx.)" if why == "approximate" else "")
            for axis, got, why in axes
            if axis and got == outcome and axis != "head_dim"
        )

    notes: list[str] = []
    lines = ["| family | compiled and verified | planned | refused |", "|---|---|---|---|"]
    for family in sorted(found):
        if family in EVERY or any(outcome in (LEFT_OUT, FAILED) and not axis for axis, outcome, _ in found[family]):
            continue
        whole = next((why for axis, outcome, why in found[family] if not axis and outcome == REFUSED), None)
        if whole is not None:
            lines.append(f"| {family} | | | all<sup>{numbers.setdefault(whole, len(numbers) + 1)}</sup> |")
        else:
            cells = " | ".join(cell(found[family], outcome) for outcome in (RIGHT, PLANNED, REFUSED))
            lines.append(f"| {family} | {cells} |")
    for why, number in numbers.items():
        told = re.sub(r"/\S*/(?=\w+\.json)", "", why)  # the folder that the model lay in while it was tried
        wrapped = textwrap.wrap(
            f"{number}. {told}", 118, subsequent_indent=" " * len(f"{number}. "), break_long_words=False
        )
        notes += [*wrapped]
    return "\n".join([*lines, "", *notes]) + "\n"


def read_log(log: Path | None) -> dict[str, Found]:
    """The outcomes that an earlier run has written; of a family that stands there twice, the last."""
    if log is None or not log.is_file():
        return {}
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return {line["family"]: [tuple(one) for one in line["found"]] for line in lines}


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description="every causal family: right, refused or failed")
    parser.add_argument("families", nargs="*")
    parser.add_argument("--plan", action="store_true", help="stop after the plan")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for one family")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log", type=Path, help="a file of JSON lines that outcomes are read from and added to")
    parser.add_argument("--document", type=Path, help="the page of families, whose last section is written")
    args = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    names = args.families or families()
    known = read_log(args.log)

    def tell(name: str, found: Found) -> None:
        for axis, outcome, why in found:
            counts[outcome] += 1
            print(f"{name:24} {axis or '-':28} {outcome:9} {why}", flush=True)

    for name in names:
        tell(name, known.get(name, []))
    jobs = [(name, args.plan, args.seconds) for name in names if name not in known]
    # A process for a few families each: what fake tensors leave behind grows with every model.
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=6) as pool:
        for name, found in pool.imap_unordered(_job, jobs):
            if args.log is not None:
                with args.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps({"family": name, "found": found}) + "\n")
            tell(name, found)
            known[name] = found
    if args.document is not None:
        from benchmarks.architectures import with_section

        page = args.document.read_text(encoding="utf-8")
        args.document.write_text(with_section(page, render(known)), encoding="utf-8")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
