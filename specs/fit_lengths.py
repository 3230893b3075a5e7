"""Fits the lengths that a spec leaves open to its teacher: no sequence is longer than what the teacher reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minitron.specs.blocks.base import LONGEST_SEQUENCE
from minitron.specs.load import LoadedSpec
from minitron.specs.source import node_at


def fit_lengths(loaded: LoadedSpec, positions: int | None) -> LoadedSpec:
    """Returns the spec with `sequence_length` of calibration and training cut to the teacher's positions where it
    is not written, and the batch made for that length where it is not written either. The hash stays that of what is written.
    """
    spec, fitted = loaded.spec, dict(loaded.fitted)
    changes: dict[str, Any] = {}
    data, distill = spec.importance.data, spec.distill
    positions = positions or LONGEST_SEQUENCE
    if (
        data is not None
        and data.sequence_length > positions
        and not is_written(loaded, "importance.data.sequence_length")
    ):
        changes["importance"] = spec.importance.model_copy(
            update={"data": data.model_copy(update={"sequence_length": positions})}
        )
        fitted["importance.data.sequence_length"] = positions
    # Phases say their lengths themselves, or take that of `distill`, which then is better written.
    lengthy = distill is not None and not distill.phases and distill.sequence_length > positions
    if distill is not None and lengthy and not is_written(loaded, "distill.sequence_length"):
        free = not any(is_written(loaded, f"distill.{key}") for key in ("global_batch_size", "micro_batch_size"))
        at_length = distill.at_length(positions, fit_batch=free)
        changes["distill"] = at_length
        fitted["distill.sequence_length"] = positions
        if at_length.global_batch_size != distill.global_batch_size and isinstance(at_length.global_batch_size, int):
            fitted["distill.global_batch_size"] = at_length.global_batch_size
    if not changes:
        return loaded
    written = loaded.written or loaded.spec
    return replace(loaded, spec=spec.model_copy(update=changes), written=written, fitted=fitted)


def is_written(loaded: LoadedSpec, path: str) -> bool:
    """Checks whether a value is written in the file, and is not a default."""
    return node_at(loaded.tree, *path.split(".")) is not None
