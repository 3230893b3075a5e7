"""The sample that each row of a value belongs to.

Values of feed-forward layers often have no batch dimension: rows are the tokens of all samples, [B*S, C], or, behind a
router, one row for each token and expert, in the order of the experts. The analysis knows what such rows are made of:

    (batch, sequence, ..)   rows stand sample by sample, and a reshape gives the batch its dimension back
    rows sorted by expert   made by indexing rows of the first kind; the index says which of them each row was

Where neither is so, the samples of a batch cannot be told apart, and the caller runs them one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from minitron.compiler.axes.dims import Dim, Size, size_of
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import argument, op_name


@dataclass(frozen=True)
class Rows:
    """The rows along `axis` of a value: row r is of sample (p // after) % batch, where p is r, or index[r].

    `before` and `after` are the sizes of what stands before and after the batch among what the rows are made of.
    """

    axis: int
    before: Size
    after: Size
    index: Node | None = None

    def split(self, value: torch.Tensor, sizes: Mapping[str, int], batch: int) -> torch.Tensor:
        """The value with the samples in front, [B, .., before, after, .., C]; of rows that stand sample by sample."""
        assert self.index is None
        shape = list(value.shape)
        shape[self.axis : self.axis + 1] = [number(self.before, sizes), batch, number(self.after, sizes)]
        return value.reshape(shape).movedim(self.axis + 1, 0)

    def members(self, index: torch.Tensor, sizes: Mapping[str, int], batch: int) -> torch.Tensor:
        """1 where row n is of sample b, [B, N] in float32; of rows that were picked by `index`."""
        samples_N = index.div(number(self.after, sizes), rounding_mode="floor") % batch
        return (samples_N == torch.arange(batch, device=index.device)[:, None]).float()


def number(size: Size, sizes: Mapping[str, int]) -> int:
    """A size as a number; `sizes` are those of batch and sequence by their symbols."""
    result = size.coefficient
    for symbol in size.symbols:
        result *= sizes[symbol]
    return result


@dataclass(frozen=True)
class TokenRows:
    """The rows of a value that were picked by `index`: row r is of the token that position p = index[r] is of, which is
    (p // after_sample) % batch of the samples and (p // after_token) % sequence of its tokens."""

    index: Node
    batch: Size
    sequence: Size
    after_sample: Size
    after_token: Size

    def tokens(self, index: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
        """The number of each row's token."""
        batch, sequence, after_sample, after_token = (
            number(size, sizes) for size in (self.batch, self.sequence, self.after_sample, self.after_token)
        )
        sample = index.div(after_sample, rounding_mode="floor") % batch
        return sample * sequence + index.div(after_token, rounding_mode="floor") % sequence


class SampleRows:
    """Finds the rows of a graph's values. `sizes_of` gives symbols their numbers for one batch of token ids."""

    def __init__(self, captured: Captured, table: AxisTable) -> None:
        self.table, self.space = table, table.space
        placeholder = next(node for node in captured.graph.nodes if node.op == "placeholder")
        self.batch: Dim = self.space.flat(table.dims(placeholder)[0])
        self.sequence: Dim = self.space.flat(table.dims(placeholder)[1])
        self._symbols = [Size.of(size).symbols for size in placeholder.meta["val"].shape]
        self._picks: dict[Dim, list[Node]] = {}
        for node in table.nodes:
            if picked_by(node) is not None and table.dims(node):
                self._picks.setdefault(self.space.flat(table.dims(node)[0]), []).append(node)

    def sizes_of(self, shape: Iterable[int]) -> dict[str, int]:
        return {symbols[0]: size for symbols, size in zip(self._symbols, shape, strict=True) if symbols}

    def find(self, node: Node) -> Rows | None:
        """The rows of a value [.., C]; None where its samples cannot be told apart."""
        dims = self.table.dims(node)[:-1]
        found = [rows for axis, dim in enumerate(dims) if (rows := self._batch_in(axis, dim)) is not None]
        if len(found) == 1:
            return found[0]
        if found or len(dims) != 1:
            return None
        for pick in self._picks.get(self.space.flat(dims[0]), []):
            of = self._batch_in(0, self.table.dims(pick.args[0])[0])  # type: ignore[arg-type]
            if of is not None:
                return Rows(0, of.before, of.after, picked_by(pick))
        return None

    def find_tokens(self, node: Node) -> TokenRows | None:
        """The tokens of the rows of a value [rows, C] that were picked from others; None where they cannot be told."""
        dims = self.table.dims(node)[:-1]
        for pick in self._picks.get(self.space.flat(dims[0]), []) if len(dims) == 1 else []:
            flat = self.space.flat(self.table.dims(pick.args[0])[0])  # type: ignore[arg-type]
            sample, token, index = _behind(self.batch, flat), _behind(self.sequence, flat), picked_by(pick)
            if sample is not None and token is not None and index is not None:
                return TokenRows(index, size_of(self.batch), size_of(self.sequence), size_of(sample), size_of(token))
        return None

    def _batch_in(self, axis: int, dim: Dim) -> Rows | None:
        flat = self.space.flat(dim)
        if len(self.batch) != 1 or flat.count(self.batch[0]) != 1:
            return None
        place = flat.index(self.batch[0])
        before, after = size_of(flat[:place]), size_of(flat[place + 1 :])
        known = {symbol for symbols in self._symbols for symbol in symbols}
        return Rows(axis, before, after) if {*before.symbols, *after.symbols} <= known else None


def _behind(run: Dim, flat: Dim) -> Dim | None:
    """The part of a dimension behind a run of neighbouring atoms; None where the run is not there once."""
    places = [place for place in range(len(flat)) if flat[place : place + len(run)] == run]
    return flat[places[0] + len(run) :] if run and len(places) == 1 else None


def picked_by(node: Node) -> Node | None:
    """The one vector of positions by which an operator picks rows of its first operand."""
    if op_name(node) == "index_select":
        index = argument(node, "index") if argument(node, "dim") == 0 else None
    elif op_name(node) == "index":
        index, *rest = argument(node, "indices")
        if any(one is not None for one in rest):
            return None
    else:
        return None
    if not isinstance(index, Node) or index.meta["val"].dim() != 1 or index.meta["val"].is_floating_point():
        return None
    return index if index.meta["val"].dtype not in (torch.bool, torch.uint8) else None
