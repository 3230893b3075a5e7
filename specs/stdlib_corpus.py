"""The Python standard library of the running interpreter as a text corpus that every machine already has.

The corpus holds the modules whose top-level name is in `sys.stdlib_module_names` (so neither site-packages nor the
regression tests nor build configuration), without the packages that are applications, prose or generated tables, and
without test folders inside packages. The held-out part depends on the top-level name alone.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from minitron.specs.errors import UsageError, WorkError

Split = Literal["train", "held_out"]

# An editor, a demo, help texts, hundreds of near-identical generated charmaps: not what one reads as a library's code.
_NOT_LIBRARY = frozenset({"idlelib", "turtledemo", "pydoc_data", "encodings"})
_NOT_SOURCE_FOLDERS = frozenset({"test", "tests", "__pycache__", "site-packages", "dist-packages"})

# One share in sixteen by name; by bytes that is 5-8% on Python 3.11 to 3.14.
_SHARES = 16
_HELD_OUT_SHARE = 12


def _stem(top_level: str) -> str:
    """Returns `top_level` without the marks of a pure-Python twin: `_pydatetime` (3.12) was `datetime` in 3.11.

    Modules move between these names from one Python version to the next and must not change sides of the split.
    """
    return re.sub(r"^_+(py_?)?", "", top_level)


def is_held_out(top_level: str) -> bool:
    """Checks whether the module or package with this top-level name is never trained on."""
    digest = hashlib.sha256(_stem(top_level).encode("utf-8")).digest()
    return digest[0] % _SHARES == _HELD_OUT_SHARE


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _top_level(relative: Path) -> str:
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _sources(root: Path) -> Iterator[Path]:
    """Yields paths of the library's sources, relative to `root`; skips folders that cannot hold any (site-packages)."""
    for entry in root.iterdir():
        name = entry.name.removesuffix(".py")
        if name not in sys.stdlib_module_names or name in _NOT_LIBRARY:
            continue
        found = entry.rglob("*.py") if entry.is_dir() else [entry] if entry.suffix == ".py" else []
        yield from (p.relative_to(root) for p in found if not _NOT_SOURCE_FOLDERS & set(p.relative_to(root).parts))


def stdlib_files(split: Split) -> list[Path]:
    """Returns the `.py` files of one side of the split: absolute, sorted by their place in the library.

    Empty files and files that are not UTF-8 are left out. UsageError for another `split`, WorkError if this Python
    comes without its sources (a zipped or frozen library).
    """
    if split not in get_args(Split):
        raise UsageError(f"python-stdlib:{split} is not a split of the corpus; write python-stdlib:train or held_out")
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = [
        root / relative
        for relative in sorted(_sources(root))
        if is_held_out(_top_level(relative)) == (split == "held_out")
        and (root / relative).stat().st_size > 0
        and _is_utf8(root / relative)
    ]
    if not files:
        raise WorkError(f"{root} holds no sources of the standard library; use a Python that is installed with them")
    return files
