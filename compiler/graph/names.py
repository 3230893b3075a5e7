"""The names of parameters and dtypes, as the model, its wrapper in the graph and the spec write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

WRAPPER = "causal_lm"


def strip_wrapper(path: str) -> str:
    """A path as the model itself names it."""
    return "" if path == WRAPPER else path.removeprefix(WRAPPER + ".")


def module_path(node: Node) -> str:
    """The path of the innermost module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return strip_wrapper(str(path))


Fetch = Callable[[str], torch.Tensor]


def dtype_of(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16"""
    value: Any = getattr(torch, name)
    assert isinstance(value, torch.dtype)
    return value
