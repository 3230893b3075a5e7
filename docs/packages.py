"""Draws the packages and who imports whom into docs/architecture.md: `python docs/packages.py`.

Read from the imports themselves, those under TYPE_CHECKING too. An arrow that follows from others is left out: where A
imports B and B imports C, the arrow from A to C adds nothing to the picture. tests/repository checks that it is current.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/packages.py -->", "<!-- end -->"
PACKAGES = ("specs", "compiler", "runtime", "cli")

Arrows = dict[str, set[str]]


def rooms(package: str) -> list[str]:
    """A package and the packages in it, as `compiler` and `compiler.axes`."""
    folders = [path.parent for path in sorted((ROOT / package).rglob("__init__.py"))]
    return [".".join(folder.relative_to(ROOT).parts) for folder in folders]


def room_of(module: str, known: list[str]) -> str | None:
    """The innermost package that a module `minitron.…` stands in; None for a module of another project."""
    name = module.removeprefix("minitron.")
    found = [room for room in known if name == room or name.startswith(f"{room}.")]
    return max(found, key=len, default=None) if module.startswith("minitron.") else None


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; `from a.b import c` may name the module a.b.c."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows() -> Arrows:
    """Package -> the packages that its own files import."""
    known = list(itertools.chain.from_iterable(rooms(package) for package in PACKAGES))
    found: Arrows = {room: set() for room in known}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            here = ".".join(path.parent.relative_to(ROOT).parts)
            found[here] |= {room for name in imported(path) if (room := room_of(name, known)) and room != here}
    return found


def merged(found: Arrows) -> Arrows:
    """Packages drawn as one box: all of specs, of runtime and of cli, and in the compiler the rooms of one level."""

    def box(room: str) -> str:
        parts = room.split(".")
        return ".".join(parts[:2]) if parts[0] == "compiler" else parts[0]

    result: Arrows = {}
    for room, others in found.items():
        result.setdefault(box(room), set()).update(box(one) for one in others)
    return {room: others - {room} for room, others in result.items()}


def reach(found: Arrows, room: str) -> set[str]:
    """Whatever a package imports, itself or through others."""
    seen: set[str] = set()
    waiting = [room]
    while waiting:
        for other in found[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def reduced(found: Arrows) -> Arrows:
    """Without the arrows that follow from others. Packages of a circle keep all of theirs: it is to be seen."""

    def follows(room: str, one: str) -> bool:
        others = found[room] - {one}
        return room not in reach(found, one) and any(
            one in reach(found, other) and not {room, other} & (reach(found, one) | reach(found, other))
            for other in others
        )

    return {room: {one for one in others if not follows(room, one)} for room, others in found.items()}


def picture() -> str:
    """The picture as Mermaid, which GitHub draws."""
    found = reduced(merged(arrows()))
    inside = sorted(room for room in found if room.startswith("compiler."))
    lines = ["```mermaid", "flowchart TD", "  subgraph compiler"]
    lines += [f"    {room.replace('.', '_')}[{room.removeprefix('compiler.')}/]" for room in inside]
    lines += ["    compiler_driver[compile.py]", "  end"]
    lines += [f"  {room}[{room}/]" for room in PACKAGES if room != "compiler"]
    name = {room: room.replace(".", "_") for room in found} | {"compiler": "compiler_driver"}
    for room in sorted(found):
        lines += [f"  {name[room]} --> {name[other]}" for other in sorted(found[room])]
    return "\n".join([*lines, "```"])


def page(text: str) -> str:
    """The page with the picture between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE.name} has no {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{picture()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
