"""Which package may import which: every import is read, also those for type checkers only and those inside functions.

docs/architecture.md says what each package is for.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PACKAGES = {"specs": set[str](), "compiler": {"specs"}, "runtime": {"specs"}, "cli": {"specs", "compiler", "runtime"}}

# What a room of the compiler may import beside itself. "." is the driver: planning.py, compile.py, verify_build.py, ...
ROOMS: dict[str, set[str]] = {
    "storage": set(),
    "graph": {"storage"},
    "teacher": set(),
    "capture": {"graph"},
    "towers": {"teacher", "capture", "storage"},
    "axes": {"capture", "graph"},
    "roles": {"axes", "capture", "graph"},
    "weights": {"axes", "capture", "teacher", "graph", "storage"},
    "student": {"roles", "axes", "capture"},
    "rewrite": {"weights", "axes", "capture", "graph", "roles"},
    "importance": {"student", "roles", "axes", "capture", "graph", "storage"},
}
ROOMS["plan"] = {*ROOMS}
ROOMS["recovery"] = {"importance", "weights", "axes", "graph", "roles", "capture"}
ROOMS["estimate"] = {"plan", "importance", "student", "roles", "axes", "capture", "graph"}
ROOMS["search"] = {"estimate", "plan", "importance", "student", "roles", "axes"}
ROOMS["emit"] = {"estimate", "weights", "roles", "axes", "teacher", "capture", "graph", "storage"}
ROOMS["verify"] = {
    "teacher",
    "recovery",
    "importance",
    "student",
    "emit",
    "roles",
    "axes",
    "capture",
    "graph",
    "weights",
}
ROOMS["."] = {*ROOMS}

MOST_PARAMETERS = 7


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of everything of minitron that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minitron":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "minitron")


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"there is no package {package}"
    return found


def room_of(file: Path) -> str:
    inside = file.relative_to(ROOT / "compiler").parts
    return inside[0] if len(inside) > 1 else "."


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_along_the_arrows(package: str) -> None:
    wrong = []
    for file in files(package):
        for line, name in imports(file):
            target = f"{name}.".split(".")[1]  # "" for `import minitron` itself
            if target in PACKAGES and target != package and target not in PACKAGES[package]:
                wrong.append(f"{place(file, line)}: {package}/ may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_of_the_compiler_is_in_the_table() -> None:
    assert {room_of(file) for file in files("compiler")} == set(ROOMS)


@pytest.mark.parametrize("room", list(ROOMS))
def test_rooms_of_the_compiler_import_along_the_arrows(room: str) -> None:
    wrong = []
    for file in (file for file in files("compiler") if room_of(file) == room):
        for line, name in imports(file):
            parts = name.split(".")
            if parts[1:2] != ["compiler"]:
                continue
            target = parts[2] if parts[2] in ROOMS else "."
            if target != room and target not in ROOMS[room]:
                wrong.append(f"{place(file, line)}: compiler/{room}/ may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_circle() -> None:
    left = {room: set(allowed) for room, allowed in ROOMS.items()}
    while left:
        free = [room for room, allowed in left.items() if not allowed & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("package", ["specs", "compiler", "runtime", "cli"])
def test_no_two_files_import_each_other(package: str) -> None:
    """Nor any longer circle, at the moment that a module is imported: imports inside functions come later."""
    edges: dict[str, set[str]] = {}
    modules = {
        ".".join(("minitron", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in files(package)
    }
    for module, file in modules.items():
        edges[module] = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    edges[module] |= {full if full in modules else node.module} & modules.keys() - {module}
    while edges:
        free = [module for module, targets in edges.items() if not targets & edges.keys()]
        if not free:
            break
        for module in free:
            del edges[module]
    assert not edges, f"a circle among {sorted(edges)}"


@pytest.mark.parametrize("package", ["compiler", "runtime"])
def test_functions_have_few_parameters(package: str) -> None:
    """More travel as one frozen dataclass; a reason in the line above (`# parameters: ...`) lets one pass."""
    wrong = []
    for file in files(package):
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls", "ctx")])
            first = min((decorator.lineno for decorator in node.decorator_list), default=node.lineno)
            if count > MOST_PARAMETERS and not lines[first - 2].lstrip().startswith("# parameters: "):
                wrong.append(f"{place(file, node.lineno)}: {node.name} has {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_functions_are_read_too(tmp_path: Path) -> None:
    """The reader itself: whatever stands under TYPE_CHECKING or in a function counts."""
    source = """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from minitron.runtime import train
        def f():
            import minitron.cli.main
    """
    file = tmp_path / "module.py"
    file.write_text(inspect.cleandoc(source))
    assert [name for _, name in imports(file)] == ["minitron.runtime.train", "minitron.cli.main"]
