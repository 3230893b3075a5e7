"""Watches the values of a running graph for NaN and infinity, and says where the first of them came from.

The values that go from one segment to the next are summed: a single NaN or infinity shows in the sum. The sum of a batch is
read once the next batch is under way, so that a GPU does not wait for the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from minitron.compiler.graph.aten import op_name
from minitron.compiler.graph.names import module_path
from minitron.specs.errors import WorkError

if TYPE_CHECKING:
    from minitron.compiler.graph.executor import Environment, Executor


@dataclass(frozen=True)
class _Seen:
    total: torch.Tensor
    before: Environment
    ids: torch.Tensor
    number: int


class Watch:
    """Watches one segment of one pass."""

    def __init__(self, executor: Executor, segment: int) -> None:
        self._executor, self._segment = executor, segment
        self._last: list[_Seen] = []

    def see(self, before: Environment, after: Environment, ids: torch.Tensor, number: int) -> None:
        """Takes in one batch, and checks the one before it. WorkError where that held NaN or infinity."""
        floats = [value for value in after.values() if _is_float(value)]
        seen = [_Seen(_total(floats), before, ids, number)] if floats else []
        self.settle()
        self._last = seen

    def settle(self) -> None:
        """Checks the last batch."""
        seen, self._last = self._last, []
        for one in seen:
            if not bool(torch.isfinite(one.total)):
                _explain(self._executor, self._segment, one)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _total(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.sum(dtype=torch.float32) for value in values]).sum()


def _explain(executor: Executor, segment: int, seen: _Seen) -> None:
    """Raises WorkError with the module, unless only the sum overflowed float32."""
    found = _first(executor, segment, seen)
    if found is None:
        return
    node, value = found
    dtype = str(executor.settings.dtype).removeprefix("torch.")
    what = "NaN" if bool(torch.isnan(value).any()) else "infinity"
    where = f"{module_path(node) or 'the model'} ({op_name(node)}) yields {what} in {dtype} on the calibration data"
    if executor.settings.dtype != torch.float32:
        before = {name: one.float() if _is_float(one) else one for name, one in seen.before.items()}
        wider = executor.in_float32()
        if _first(wider, segment, _Seen(seen.total, before, seen.ids, seen.number)) is None:
            raise WorkError(f"{where}, and in float32 it does not; write `teacher.dtype: float32` into the spec")
    raise WorkError(
        f"{where}, and no dtype that models are run in holds it; the weights are damaged, or their training had diverged: "
        "take another checkpoint of this model"
    )


def _first(executor: Executor, segment: int, seen: _Seen) -> tuple[Node, torch.Tensor] | None:
    """The first node of a segment that makes NaN or infinity out of finite numbers. Masks may hold infinity: a value that is
    made of one counts once it holds NaN."""
    for node, value, sources in executor.trace(segment, seen.before, seen.ids):
        if not _is_float(value) or bool(torch.isfinite(value).all()):
            continue
        floats = [one for one in sources if _is_float(one)]
        finite = all(bool(torch.isfinite(one).all()) for one in floats)
        if finite and op_name(node) not in _MASKING and not _masks_twice(value, floats):
            return node, value
        if bool(torch.isnan(value).any()) and not any(bool(torch.isnan(one).any()) for one in floats):
            return node, value
    return None


def _masks_twice(value: torch.Tensor, sources: list[torch.Tensor]) -> bool:
    """Checks whether the only infinities are those of positions that a mask had hidden already: the least number of a
    dtype, with another mask's added to it."""
    hidden = any(bool((one <= torch.finfo(one.dtype).min / 2).any()) for one in sources)
    return hidden and not bool((torch.isnan(value) | torch.isposinf(value)).any())


# Operators that put infinity where positions are hidden.
_MASKING = {"masked_fill", "masked_fill_", "where", "full", "full_like", "new_full", "triu", "scalar_tensor"}
