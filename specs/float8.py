"""The matrix products that are computed in float8: which linear layers they are of, and what they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from minitron.specs.errors import Problem
from minitron.specs.model_config import EXPERT_COUNT_KEYS

Compute: TypeAlias = Literal["bfloat16", "float8"]

MULTIPLE = 16
"""The number that both sizes of a weight must be multiples of: the kernels read rows of 16 bytes."""

CAPABILITY = (8, 9)
"""The first CUDA compute capability with products in float8: Ada. Hopper has 9.0, Blackwell 10.0."""


def counts_of_experts(config: Mapping[str, Any]) -> frozenset[int]:
    """Returns the numbers of experts that a model's configuration names, also of a model inside it."""
    found = {config[key] for key in EXPERT_COUNT_KEYS if isinstance(config.get(key), int)}
    inner = [counts_of_experts(value) for value in config.values() if isinstance(value, Mapping)]
    return frozenset(found).union(*inner)


def fits_float8(path: str, rows: int, columns: int, experts: frozenset[int]) -> bool:
    """Checks whether a linear layer, which lies at `path` inside of a decoder layer and has a weight [rows, columns], is
    computed in float8. `experts`: what a router yields, one number for each expert.

    A router decides by small differences. Linear layers in a list inside of the layer are experts: some of them are given few
    tokens or none.
    """
    listed = any(part.isdigit() for part in path.split("."))
    return not listed and rows not in experts and rows % MULTIPLE == 0 and columns % MULTIPLE == 0


def missing_library(*uses: tuple[Compute, str]) -> Iterator[Problem]:
    """Yields a problem for each use, a value and its place, that needs torchao where torchao is not installed."""
    for compute, at in uses:
        if compute == "float8" and importlib.util.find_spec("torchao") is None:
            hint = "pip install 'minitron[float8]' where the student is trained, or write bfloat16"
            yield Problem(at, "float8 is computed by torchao, which is not installed here", hint)
