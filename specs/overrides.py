"""Applies `--set path.in.spec=value`."""

from __future__ import annotations

from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.one_line import message_text
from minitron.specs.shape import Path, dotted, from_dotted
from minitron.specs.source import MAX_DEPTH, Entry, Mapping, Node, Place, Scalar, Sequence, read_text


def apply_override(root: Mapping, override: str) -> Mapping:
    """Returns the tree with one value replaced or added. UsageError for text that is not `path=value` or leads nowhere.

    Errors that are later found in the value have the override itself as their place.
    """
    name, equals, text = override.partition("=")
    override = message_text(override)  # from here on it stands in messages only
    if not equals or not all(name.split(".")):
        raise UsageError(f"--set {override}: write --set path.in.spec=value, such as --set student.hidden_size=4096")
    if name.count(".") >= MAX_DEPTH:
        raise UsageError(
            f"--set {override}: the path has more than {MAX_DEPTH} steps, and no value of a spec is so deep"
        )
    place = Place(f"--set {override}", 0, 0)
    try:
        value, errors = read_text(text, f"--set {override}")
        if errors:
            raise SpecInvalid(errors)
    except SpecInvalid as error:
        reasons = "; ".join(f"{found.message}; {found.hint}" for found in error.errors)
        raise UsageError(f"--set {override}: the value is wrong: {reasons}") from None
    replaced = _replace(root, from_dotted(name), _at(value, place), place, override, ())
    assert isinstance(replaced, Mapping)
    return replaced


def _at(node: Node, place: Place) -> Node:
    match node:
        case Scalar():
            return Scalar(place, node.text, node.value)
        case Sequence():
            return Sequence(place, [_at(item, place) for item in node.items])
        case Mapping():
            return Mapping(place, {key: Entry(place, _at(entry.node, place)) for key, entry in node.entries.items()})


def _replace(node: Node | None, rest: Path, value: Node, place: Place, override: str, above: Path) -> Node:
    """Returns `node` with the value at `rest` below it replaced; missing mappings on the way are added."""
    if not rest:
        return value
    step, *_ = rest
    if isinstance(node, Sequence):
        if not isinstance(step, int) or step >= len(node.items):
            places = f"0 to {len(node.items) - 1}" if node.items else "none: it is empty"
            raise UsageError(
                f"--set {override}: `{dotted(above)}` is a list with places {places}; "
                f"write one of these, or replace the list: --set '{dotted(above)}=[...]'"
            )
        items = list(node.items)
        items[step] = _replace(items[step], rest[1:], value, place, override, (*above, step))
        return Sequence(node.place, items)
    if isinstance(node, Scalar) and node.value is not None:
        raise UsageError(
            f"--set {override}: `{dotted(above)}` is `{node.text}` and has nothing below it; "
            f"replace it: --set '{dotted(above)}={{{step}: ...}}'"
        )
    entries = dict(node.entries) if isinstance(node, Mapping) else {}
    before = entries.get(str(step))
    child = _replace(before.node if before else None, rest[1:], value, place, override, (*above, step))
    kept = before.place if before and len(rest) > 1 else place
    entries[str(step)] = Entry(kept, child)
    return Mapping(node.place if isinstance(node, Mapping) else place, entries)
