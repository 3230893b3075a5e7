"""The differences of two specs or builds: key by key in the spec, width by width and cost by cost in the plan, and for
two builds also the kept indices and the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitron.cli import figures
from minitron.cli.plan_sections import model_rows, written
from minitron.cli.sections import Column, Document, Section, entries, part


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its name, its plan, the resolved spec (None in a build of an older version), and the
    results of a build that was evaluated.
    """

    name: str
    plan: Document
    spec: Document | None
    results: Document | None = None


def difference(left: Side, right: Side) -> Document:
    """Compares two sides: `a`, `b` (names); `spec`, `plan`, `results`: `[{path, a, b}]`, `selection`: `[{axis, a, b,
    shared}]` (counts of kept indices, and of those in both). Null stands for a value that one side does not have.
    """
    specs, results = (left.spec, right.spec), (left.results, right.results)
    return {
        "a": left.name,
        "b": right.name,
        "spec": None if None in specs else _changes(left.spec or {}, right.spec or {}),
        "plan": _changes(_compared(left.plan), _compared(right.plan)),
        "selection": _selections(left.plan, right.plan),
        "results": None if None in results else _changes(_measured(left), _measured(right)),
    }


def diff_sections(content: Document, left: Side, right: Side) -> list[Section]:
    """Returns the sections of `difference`: the changed keys of the spec, then every width and cost of the two
    students.
    """
    sections = [Section("A and B", notes=(f"A is {left.name}", f"B is {right.name}"))]
    if content["spec"] is not None:
        columns = (Column("key"), Column("A"), Column("B"))
        rows = tuple((one["path"], _plain(one["a"]), _plain(one["b"])) for one in content["spec"])
        sections.append(Section("Spec", columns if rows else (), rows, () if rows else ("no difference",)))
    changed = {one["path"].split(".")[0] for one in content["plan"]}
    for side in ("teacher", "student"):
        # Two students of one teacher are the usual case: the teacher is shown only where there are two.
        if side == "student" or side in changed:
            sections.append(_models(side, left.plan, right.plan))
    phases = _phases(left.plan, right.plan)
    if phases.rows:
        sections.append(phases)
    if content["selection"]:
        sections.append(_kept(content["selection"]))
    if content["results"] is not None:
        sections.append(_results(content["results"]))
    return sections


def _kept(changes: list[Document]) -> Section:
    rows = tuple((one["axis"], *(figures.count(one[key]) for key in ("a", "b", "shared"))) for one in changes)
    columns = (Column("axis"), *(Column(name, right=True) for name in ("A", "B", "kept in both")))
    return Section("Selection", columns, rows)


def _results(changes: list[Document]) -> Section:
    rows = tuple((one["path"], _number(one["a"]), _number(one["b"]), _change(one["a"], one["b"])) for one in changes)
    columns = (Column("result"), *(Column(name, right=True) for name in ("A", "B", "change")))
    return Section("Results", columns if rows else (), rows, () if rows else ("no difference",))


def _selections(left: Document, right: Document) -> list[Document] | None:
    """Compares the indices that two builds of one teacher kept, axis by axis; None unless both have selected."""
    a, b = part(left, "selection"), part(right, "selection")
    if not a or not b:
        return None
    found = []
    for axis in dict.fromkeys([*a, *b]):
        lists = a.get(axis, []), b.get(axis, [])
        shared = sum(len(set(one) & set(other)) for one, other in zip(*lists, strict=False))
        sizes = [sum(map(len, one)) for one in lists]
        if lists[0] != lists[1]:
            found.append({"axis": axis, "a": sizes[0], "b": sizes[1], "shared": shared})
    return found


def _measured(side: Side) -> Document:
    """Returns the part of the results that is compared: losses, task scores, the recovered share; texts and speeds
    differ between any two runs and are left out.
    """
    results = side.results or {}
    models: Document = {}
    for name, model in part(results, "models").items():
        held_out = part(model, "held_out")
        tasks = {task: score.get("value") for task, score in part(model, "tasks").items() if isinstance(score, dict)}
        models[name] = {key: held_out[key] for key in ("loss", "perplexity") if key in held_out} | tasks
    return models | {"recovered": results.get("recovered")}


def _models(side: str, left: Document, right: Document) -> Section:
    pair = {"teacher": left.get(side), "student": right.get(side)}
    rows = tuple(
        (label, written(a, kind), written(b, kind), _change(a, b)) for label, a, b, kind, _ in model_rows(pair)
    )
    columns = (Column(""), Column("A", right=True), Column("B", right=True), Column("change", right=True))
    return Section(side.capitalize(), columns, rows)


def _phases(left: Document, right: Document) -> Section:
    sides = [{str(one.get("name")): one for one in entries(plan, "phases")} for plan in (left, right)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        for key, label, write in (
            ("tokens", "tokens", figures.count),
            ("peak_memory_bytes", "peak memory", figures.size),
            ("device_hours", "device-hours", figures.hours),
        ):
            a, b = (phases.get(name, {}).get(key) for phases in sides)
            rows.append((f"{name} {label}", write(a), write(b), _change(a, b)))
    columns = (Column("phase"), Column("A", right=True), Column("B", right=True), Column("change", right=True))
    return Section("Phases", columns, tuple(rows))


def _compared(plan: Document) -> Document:
    """Returns the part of a plan that is compared: the models and the phases, without the spec's path and the kept
    indices.
    """
    phases = {
        str(one.get("name")): {k: v for k, v in one.items() if k not in ("name", "does")}
        for one in entries(plan, "phases")
    }
    return {"teacher": plan.get("teacher"), "student": plan.get("student"), "phases": phases}


def _changes(left: Document, right: Document) -> list[Document]:
    a, b = dict(_leaves(left)), dict(_leaves(right))
    return [
        {"path": path, "a": a.get(path), "b": b.get(path)}
        for path in dict.fromkeys([*a, *b])
        if a.get(path) != b.get(path)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value that is not a mapping, with its dotted path; a list is one value."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves(one, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _change(a: Any, b: Any) -> str:
    if a == b:
        return ""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (a, b))
    return f"{100 * (b - a) / a:+.1f}%" if numbers and a else "changed"


def _plain(value: Any) -> str:
    return figures.NOTHING if value is None else str(value)


def _number(value: Any) -> str:
    return figures.decimal(value) if isinstance(value, int | float) else _plain(value)
