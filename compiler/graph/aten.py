"""ATen operators: their names, and the classes that several passes ask about."""

from __future__ import annotations

import torch
from torch.fx import Node


def op_name(node: Node) -> str:
    """`linear` for aten.linear.default."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))


MOVES = {
    "view",
    "reshape",
    "contiguous",
    "to",
    "alias",
    "type_as",
    "clone",
    "_to_copy",
    "transpose",
    "permute",
    "flatten",
}


RESHAPES = {"view", "reshape", "flatten", "to", "alias", "contiguous", "clone"}


PASS_THROUGH = {"transpose", "t", "to", "permute", "contiguous", "alias", "numpy_T", "mT", "_to_copy", "detach"}


NEUTRAL = {"to", "_to_copy", "alias", "type_as", "contiguous", "clone", "slice", "float", "dropout"}


# They copy only where they must, which their schemas do not say.
MAY_SHARE = {"reshape", "contiguous", "to", "flatten", "type_as", "reshape_as"}


def axis_index(dim: int, rank: int) -> int:
    """A dimension number as counted from the front."""
    return dim % rank if rank else 0
