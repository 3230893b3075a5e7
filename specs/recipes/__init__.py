"""The specs to start from: a commented one, and published recipes. Each is a YAML file beside this module."""

from __future__ import annotations

from pathlib import Path

from minitron.specs.errors import UsageError
from minitron.specs.suggest import closest

_FOLDER = Path(__file__).resolve().parent
_STARTER = "starter"


def recipe_names() -> list[str]:
    """Returns the names of the published recipes in alphabetical order."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml") if file.stem != _STARTER)


def recipe_text(name: str) -> str:
    """Returns the YAML text of a recipe. UsageError for an unknown name."""
    names = recipe_names()
    if name not in names:
        nearest = closest(name, names)
        hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(names)}"
        raise UsageError(f"there is no recipe {name}; {hint}")
    return _read(name)


def starting_spec() -> str:
    """Returns the YAML text of a commented spec to start from."""
    return _read(_STARTER)


def _read(name: str) -> str:
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
