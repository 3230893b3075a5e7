"""What the language has and this version cannot do yet: the one place that says so."""

from __future__ import annotations

from collections.abc import Iterator

from minitron.specs.spec import Spec


def unavailable(spec: Spec) -> list[tuple[str, str]]:
    """What `spec` asks for and this version cannot do, as (dotted path, one line that says what to write instead)."""
    return [
        (path, f"{what} is not available in this version; {instead}")
        for path, what, instead in _asked_for_too_soon(spec)
    ]


def _asked_for_too_soon(spec: Spec) -> Iterator[tuple[str, str, str]]:
    if spec.importance.selection == "greedy":
        yield "importance.selection", "greedy", "write scores or leave it out"
    if spec.importance.hidden_basis == "principal":
        yield "importance.hidden_basis", "principal", "write channels or leave it out"
    if spec.recovery.refit == "least_squares":
        yield "recovery.refit", "least_squares", "write none or leave it out"
    if spec.recovery.merge_heads:
        yield "recovery.merge_heads", "true", "write false or leave it out"
    if spec.search is not None:
        yield "search", "search", "leave it out and write one value for each width"
