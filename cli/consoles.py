"""The terminals that a command writes to: results on stdout, messages and progress on stderr."""

from __future__ import annotations

from rich.console import Console


def stdout_console() -> Console:
    """Returns the console for results. A pipe has no width, so tables are not folded there as they are on a narrow
    terminal.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    return console


def stderr_console() -> Console:
    """Returns the console for messages and progress."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)
