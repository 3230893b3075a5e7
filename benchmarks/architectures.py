"""Writes docs/architectures.md: family by axis, every cell found by compiling a tiny model of that family.

    python benchmarks/architectures.py [FAMILY ...] [--workers 2] [-o docs/architectures.md]

A cell is `exact` (equal to masking, verified), `approximate` (verified but for masking, which is not the same there) or
`refused`; footnotes name the reasons. Each axis is narrowed alone, then all that can be together. Nothing is written
where a compile fails its own verification: that is a bug, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HIDDEN, HEADS, GROUPS, LAYERS = "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"
FIRST = [HIDDEN, "intermediate_size", HEADS, GROUPS, LAYERS, "num_experts", "moe_intermediate_size"]
HEADER = """\
# Architectures

Found by `python benchmarks/architectures.py`, which compiles a tiny random model of each family for every cell: the axis
alone, then all that are not refused together. A student passes when the rewritten graph and the Hugging Face model loaded
from disk agree, permuting the axis in the teacher changes nothing and, where the table says exact, the masked teacher agrees.

- **exact**: equal to masking (of a norm: once its mean is taken over the channels that are left)
- **approx.**: a sound narrower model, but not the same function as the masked teacher; `minitron plan` says why
- **refused**: with the reason in the footnote
- **with hidden**: only in proportion with hidden_size, from which the width of a head is derived
- – : the family has no such axis
- **together**: all that can be asked for, each as far as alone, in one compile; refused where the configuration has no keys
  that say all of it at once

Other families go through the same analysis: `minitron plan` says of any model what can be narrowed.

"""
OTHERS = """
## Other families of transformers' causal models

Found by `python benchmarks/all_families.py`, all axes together where that passes and each alone where it does not, on a
tiny random model whose configuration is the family's own default, made small. Planned: the student was proved on the
meta device, and not compiled in this run.

"""


@dataclass
class Row:
    """The findings on one family: axis -> cell, footnotes, and what went wrong where it must not."""

    family: str
    cells: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    together: str = "–"
    refusal: str = ""
    broken: list[str] = field(default_factory=list)


def examine(family: str) -> Row:
    """Compiles every cell of one row."""
    import torch

    from minitron.compiler.capture.models import layer_count
    from minitron.specs.blocks.student import Student
    from minitron.specs.errors import SpecInvalid
    from tests.foundry import Apprentice, Foundry
    from tests.models import save_teacher
    from tests.zoo.configs import config_of

    torch.set_num_threads(1)
    row = Row(family)
    with tempfile.TemporaryDirectory() as folder:
        foundry = Foundry(Path(folder), Apprentice())
        config = config_of(family)
        teacher = save_teacher(Path(folder) / family, config)
        try:
            with foundry.shortened():
                plan = foundry.plan(teacher, {LAYERS: layer_count(config)})
        except SpecInvalid as error:
            row.refusal = reason(error)
            return row
        statuses = {one.axis: one for one in plan.targets.statuses}

        def attempt(student: dict[str, int], program: bool = False) -> str | None:
            try:
                foundry.build(teacher, student, program=program)
                return None
            except SpecInvalid as error:
                return reason(error)
            except Exception as error:  # a bug of ours, told with all others
                row.broken.append(f"{family} {student}: {type(error).__name__}: {error}")
                return "fails"

        done: dict[str, int] = {}
        for axis, status in statuses.items():
            if axis not in Student.model_fields:
                continue  # no spec can name it: it follows another
            if status.status == "refused":
                row.cells[axis], row.notes[axis] = "refused", status.reason
                continue
            width = narrower(axis, status.teacher)
            if width == status.teacher:
                row.cells[axis] = "only one"
                continue
            refusal = attempt({axis: width})
            row.cells[axis] = (
                {"exact": "exact", "approximate": "approx."}[status.status] if refusal is None else "refused"
            )
            if refusal is None:
                done[axis] = width
            else:
                row.notes[axis] = refusal
        if "refused" in (row.cells.get(HIDDEN), row.cells.get(HEADS)) and HIDDEN in statuses and HEADS in statuses:
            both = {HIDDEN: statuses[HIDDEN].teacher // 2, HEADS: statuses[HEADS].teacher // 2}
            derived = [
                axis for axis in (HIDDEN, HEADS) if "hidden_size / num_attention_heads" in row.notes.get(axis, "")
            ]
            if derived and attempt(both) is None:
                for axis in {HIDDEN, HEADS, GROUPS} & set(row.cells):
                    row.cells[axis], _ = "with hidden" if axis != HIDDEN else "with heads", row.notes.pop(axis, None)
                done |= both
        if done:
            outcome = attempt(done, program=True)
            # What each axis can be alone, a configuration may not be able to say of all: that is refused, with its reason.
            row.together = {None: "passed", "fails": "fails"}.get(outcome, "refused")
    return row


def narrower(axis: str, width: int) -> int:
    """Three quarters of the channels of the residual stream, half of everything else, at least one."""
    return width * 3 // 4 if axis == HIDDEN else max(1, width // 2)


def reason(error: Exception) -> str:
    """The message without its place in a file that is gone."""
    text = str(error).splitlines()[0]
    for mark in ("student: ", "teacher.model: "):
        if mark in text:
            return text.split(mark, 1)[1]
    return text.split(": ", 2)[-1]


def render(rows: list[Row]) -> str:
    """The document."""
    present = {axis for row in rows for axis in row.cells}
    axes = [axis for axis in FIRST if axis in present] + sorted(present - {*FIRST, "head_dim"})
    lines = ["| family | " + " | ".join(axes) + " | together |", "|---" * (len(axes) + 2) + "|"]
    numbers: dict[str, int] = {}

    def mark(text: str) -> str:
        return f"<sup>{numbers.setdefault(text, len(numbers) + 1)}</sup>"

    for row in rows:
        if row.refusal:
            cells = ["refused" + mark(row.refusal)] * len(axes)
        else:
            cells = [row.cells.get(a, "–") + (mark(row.notes[a]) if a in row.notes else "") for a in axes]
        lines.append(f"| {row.family} | " + " | ".join(cells) + f" | {row.together} |")
    lines += [""] + [f"{number}. {text}" for text, number in numbers.items()]
    heads = sorted({(row.notes["head_dim"], row.family) for row in rows if "head_dim" in row.notes})
    lines += ["", "`head_dim` is refused wherever the graph shows that it cannot be narrowed alone:", ""]
    reasons: dict[str, list[str]] = {}
    for text, family in heads:
        reasons.setdefault(text.split(" (")[0], []).append(family)
    lines += [f"- {text}: {', '.join(families)}" for text, families in reasons.items()]
    return HEADER + "\n".join(lines) + "\n"


def with_section(page: str, section: str) -> str:
    """The page with another last section."""
    return page.split(OTHERS, 1)[0] + OTHERS + section


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests.zoo.configs import EVERY

    parser = argparse.ArgumentParser(description="family by axis, every cell by compiling it")
    parser.add_argument("families", nargs="*", default=list(EVERY))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "architectures.md")
    args = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(args.workers) as pool:
        for row in pool.map(examine, args.families):
            rows.append(row)
            print(
                row.family,
                row.refusal or row.cells,
                row.together,
                *row.broken,
                sep="\n    ",
                file=sys.stderr,
                flush=True,
            )
    broken = [line for row in rows for line in row.broken]
    if broken:
        print(*broken, sep="\n", file=sys.stderr)
        return 1
    page = render(sorted(rows, key=lambda row: row.family))
    _, mark, others = (args.output.read_text(encoding="utf-8") if args.output.exists() else "").partition(OTHERS)
    args.output.write_text(page + mark + others, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
