"""Fills in the values that a block takes from another block when it leaves them out."""

from __future__ import annotations

from minitron.specs.source import Entry, Mapping, Node, Scalar, node_at

# Keys of `student` whose value needs no scores.
_UNSCORED = {"layers", "multiple_of"}


def inherit(tree: Mapping) -> Mapping:
    """Returns the tree with `importance.data` taken from `distill.data` if scores need data and none is given: the
    documents that the student is trained on, in sequences of the same length. Places stay those of `distill.data`."""
    data, student = node_at(tree, "distill", "data"), node_at(tree, "student")
    scored = isinstance(student, Mapping) and not student.entries.keys() <= _UNSCORED
    scored |= isinstance(node_at(tree, "search", "budget"), Mapping)  # which proposes shapes, where none is written
    importance = node_at(tree, "importance")
    if not scored or not isinstance(data, Mapping) or not _missing(node_at(tree, "importance", "data")):
        return tree
    if not _missing(importance) and not isinstance(importance, Mapping):
        return tree
    distill = tree.entries["distill"].node
    assert isinstance(distill, Mapping), "it holds data"
    taken = dict(data.entries)
    if "sequence_length" in distill.entries:
        taken["sequence_length"] = distill.entries["sequence_length"]
    place = distill.entries["data"].place
    kept = dict(importance.entries) if isinstance(importance, Mapping) else {}
    kept["data"] = Entry(place, Mapping(place, taken))
    at = tree.entries["importance"].place if "importance" in tree.entries else place
    return Mapping(tree.place, dict(tree.entries) | {"importance": Entry(at, Mapping(at, kept))})


def _missing(node: Node | None) -> bool:
    return node is None or (isinstance(node, Scalar) and node.value is None)
