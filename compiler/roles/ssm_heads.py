"""The heads of state-space and linear-attention layers, as the graph shows them.

Such a mixer takes a product of heads and their channels back into the residual stream, and it has a number for each head:
its decay, say. Where heads share what they read and write (as of arXiv 2405.21060; keys and queries of linear attention)
they are (group, head within it), and a narrowed model keeps as many in each group, so that every head stays with its own:
group-aware pruning, arXiv 2504.11409.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from minitron.compiler.axes.dims import Atom, Dim
from minitron.compiler.axes.table import AxisTable, Contraction
from minitron.compiler.capture.capture import Captured
from minitron.compiler.roles.experts import prunable_per_owner
from minitron.compiler.roles.names import SCAN_HEADS


@dataclass(frozen=True)
class Scan:
    """The heads of one mixer.

    heads    (group, head within it), or one atom where all heads share, or every head has its own
    channel  the width of a head
    reader   takes [.., heads, channel] back into the residual stream; what it reads scores both
    """

    heads: Dim
    channel: Atom
    reader: Contraction

    @property
    def groups(self) -> int:
        return self.heads[0].size.coefficient if len(self.heads) == 2 else 1

    def scores(self, name: str, channels: torch.Tensor, *, apart: bool) -> torch.Tensor:
        """From scores of all channels [groups * heads * width]: of heads [groups, heads], of channels [all heads,
        width].

        Scores are L2 norms over the channels of an index. Without `apart` all groups, or heads, share one list.
        """
        each = channels.reshape(self.groups, -1, self.channel.size.coefficient)
        found = each.norm(dim=-1) if name == SCAN_HEADS else each.flatten(0, 1)
        return found if apart and found.shape[0] > 1 else found.norm(dim=0)


def find_scans(captured: Captured, table: AxisTable, hidden: Atom, taken: Collection[Atom]) -> dict[int, Scan]:
    """The mixers by layer; of a layer with several kinds, the first."""
    space = table.space
    vectors: dict[int | None, set[Dim]] = {}
    for name, dims in table.parameters.items():
        if len(dims) == 1:
            vectors.setdefault(captured.layer_in_path(name), set()).add(space.flat(dims[0]))
    scans: dict[int, Scan] = {}
    for contraction in table.contractions:
        layer = captured.layer_in_path(contraction.weight) if contraction.weight is not None else None
        if contraction.weight is None or layer is None or layer in scans:
            continue
        *heads, channel = space.flat(contraction.dim) or (None,)
        back = any(list(space.leaves(dim)) == [hidden] for dim in table.parameters[contraction.weight])
        atoms = [atom for atom in (*heads, channel) if atom is not None]
        simple = all(atom.parts is None and atom not in taken for atom in atoms)
        if channel is not None and back and simple and 1 <= len(heads) <= 2 and tuple(heads) in vectors.get(layer, ()):
            scans[layer] = Scan(tuple(heads), channel, contraction)
    return scans


def heads_apart(table: AxisTable, scan: Scan) -> bool:
    """Checks whether the kept heads may differ from group to group."""
    return len(scan.heads) == 2 and prunable_per_owner(table, scan.heads[1], scan.heads[:1])


def channels_apart(table: AxisTable, scan: Scan) -> bool:
    """Checks whether the kept channels of a head may differ from head to head."""
    return prunable_per_owner(table, scan.channel, scan.heads)
