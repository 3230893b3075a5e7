"""Checks where a student can run: the requirements of serving programs on its shapes, known before any money is spent.

- Tensor parallelism (vLLM, TensorRT-LLM, SGLang): n devices share the query heads and the channels of every feed-forward
  layer evenly, and the key-value groups too, or each group stands whole on n / groups devices.
- K-quants of llama.cpp: blocks of 256 weights along a row, so rows are multiples of 256; a tensor whose rows are not falls
  back to blocks of 32 weights, and one that is neither stays as it is.
- The width of a head: where it is not hidden_size / num_attention_heads, a loader has to read the key `head_dim`.
- Tied embeddings: one tensor in the files that is used twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron.compiler.roles.names import FEED_FORWARD, GROUPS, HEAD_DIM, HEADS, HIDDEN, SCAN_HEADS

PARALLEL_SIZES = (2, 4, 8)
K_QUANT_ROW = 256
FALLBACK_ROW = 32


@dataclass(frozen=True)
class Fitness:
    """One thing that a student is asked for, and how it meets it."""

    name: str
    ok: bool
    value: str
    reason: str | None = None
    nearest: str | None = None
    """The smallest changes of widths that would meet it."""


def deployment(config: Any, model: torch.nn.Module, widths: Mapping[str, int]) -> list[dict[str, Any]]:
    """The `deployment` of a plan: `{name, ok, value, reason, nearest}` each. `model` is the student on the meta device,
    `widths` are those of its axes by name."""
    return [asdict(one) for one in _all(config, model, widths)]


def _all(config: Any, model: torch.nn.Module, widths: Mapping[str, int]) -> Iterator[Fitness]:
    yield tensor_parallel(widths)
    yield k_quants(model, widths)
    if (head := head_width(config, widths)) is not None:
        yield head
    tied = bool(getattr(config, "tie_word_embeddings", False))
    yield Fitness("embeddings", True, "tied" if tied else "untied")


def tensor_parallel(widths: Mapping[str, int]) -> Fitness:
    """Finds the numbers of devices over which the layers can be split evenly."""
    sizes = [1] + [size for size in PARALLEL_SIZES if not list(_obstacles(widths, size))]
    failing = next((size for size in PARALLEL_SIZES if size not in sizes), None)
    value = ", ".join(map(str, sizes)) + (" devices" if sizes[-1] > 1 else " device")
    if failing is None:
        return Fitness("tensor parallelism", True, value)
    obstacles = list(_obstacles(widths, failing))
    reason = ", ".join(f"{name} {widths[name]}" for name in obstacles) + f": not divisible by {failing}"
    return Fitness("tensor parallelism", False, value, reason, _nearest(widths, obstacles, failing))


def _obstacles(widths: Mapping[str, int], size: int) -> Iterator[str]:
    """The widths that cannot be shared by `size` devices."""
    for name in (HEADS, *FEED_FORWARD, SCAN_HEADS):
        if widths.get(name, 0) % size:
            yield name
    groups = widths.get(GROUPS)
    if groups and groups % size and size % groups:
        yield GROUPS


def k_quants(model: torch.nn.Module, widths: Mapping[str, int]) -> Fitness:
    """Checks whether every matrix can be stored in K-quants, by the lengths of its rows."""
    rows: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            rows.setdefault(int(parameter.shape[-1]), []).append(name)
    count = sum(map(len, rows.values()))
    short = {length: names for length, names in rows.items() if length % K_QUANT_ROW}
    if not short:
        return Fitness("K-quants (rows of 256)", True, "all matrices")
    affected = sum(map(len, short.values()))
    reasons = []
    for length, names in sorted(short.items()):
        instead = "blocks of 32" if length % FALLBACK_ROW == 0 else "no blocks at all"
        reasons.append(f"rows of {length} ({names[0]}, {len(names)} in all) take {instead}")
    obstacles = [name for name in (HIDDEN, *FEED_FORWARD) if widths.get(name) in short]
    nearest = _nearest(widths, obstacles, K_QUANT_ROW)
    return Fitness(
        "K-quants (rows of 256)", False, f"{count - affected} of {count} matrices", "; ".join(reasons), nearest
    )


def head_width(config: Any, widths: Mapping[str, int]) -> Fitness | None:
    """Checks whether the width of a head follows from the others; None where the model has no heads of one width."""
    hidden, heads, width = (widths.get(name) for name in (HIDDEN, HEADS, HEAD_DIM))
    width = width or getattr(config, HEAD_DIM, None)
    if not hidden or not heads or not isinstance(width, int):
        return None
    if width * heads == hidden:
        return Fitness("head width", True, f"{width}, which is {HIDDEN} / {HEADS}")
    derived = f"{hidden / heads:g}"
    reason = f"{HIDDEN} / {HEADS} is {derived}: a loader has to read the key {HEAD_DIM}, and old ones do not"
    return Fitness("head width", False, str(width), reason)


def _nearest(widths: Mapping[str, int], names: list[str], multiple: int) -> str | None:
    """The closest multiple for each of the widths, the larger where two are as close: it loses nothing."""
    changes = []
    for name in names:
        below, above = widths[name] // multiple * multiple, -(-widths[name] // multiple) * multiple
        closest = below if below and widths[name] - below < above - widths[name] else above
        changes.append(f"{name}: {closest}")
    return ", ".join(changes) or None
