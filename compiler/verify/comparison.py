"""Compares the logits of two routes to one function, against what rounding alone makes of them.

Two right routes differ by the order of sums. How much that is, is a matter of the model and of the token: it is measured,
as what the logits of each token move by when every weight moves by its last bit. A token's logits may differ by MARGIN
times that, or times what it is for the middle one of all tokens, if that is more.

No token vouches for another, and no large logit for a small one: of each number its own last bits are allowed besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron.compiler.verify.checks import Check, exactly

# Right students of small models stay below 4, and sums of thousands of terms round more than those of a few; a wrong
# channel is off by 1e4.
MARGIN = 32.0
# Last bits of a number itself by which a sum in another order may be off.
OWN_BITS = 4


@dataclass(frozen=True)
class Floor:
    """`rows` [B, S]: what rounding makes of the logits of each token."""

    rows: torch.Tensor

    def typical(self, logits: torch.Tensor) -> Floor:
        """The floor of the middle one of all tokens, for each of other tokens whose `logits` [B, S, V] these are."""
        return Floor(self.rows.median().expand(logits.shape[:2]))

    def or_more(self, other: Floor) -> Floor:
        """The larger of two floors, token by token: each of two routes rounds by itself."""
        return Floor(torch.maximum(self.rows, other.rows))

    @property
    def allowed(self) -> torch.Tensor:
        """[B, S]"""
        return MARGIN * torch.maximum(self.rows, self.rows.median())


def measured(moved: torch.Tensor, still: torch.Tensor) -> Floor:
    """The floor from logits [B, S, V] and from those of a run that only rounding tells from it. One such run may happen to
    round to the same numbers, as that of a model of two channels does: a few last bits of the logits' spread are the least."""
    spreads = torch.tensor([spread(row) for row in still.flatten(0, 1)], dtype=torch.float64)
    least = OWN_BITS * torch.finfo(torch.float32).eps * spreads.reshape(still.shape[:2])
    return Floor(torch.maximum(distance(moved, still), least.to(still.device)))


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[B, S]: the largest difference of two tokens' logits [B, S, V], beyond the last bits of the logits themselves."""
    rows = []
    for a, b in zip(one.flatten(0, 1), other.flatten(0, 1), strict=True):  # a token at a time: vocabularies are large
        a, b = a.double(), b.double()
        own = OWN_BITS * torch.finfo(torch.float32).eps * torch.maximum(a.abs(), b.abs())
        # NaN, and infinity minus infinity, count as infinitely far apart.
        rows.append(((a - b).abs() - own).nan_to_num(nan=float("inf")).max().clamp(min=0.0))
    return torch.stack(rows).reshape(one.shape[:2])


def spread(logits: torch.Tensor) -> float:
    """The size of the logits of one token: how far apart they lie, without the few that lie far out."""
    low, high = logits.double().quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    return max(float(high - low), torch.finfo(torch.float32).tiny)


def compare(
    name: str, got: torch.Tensor, wanted: torch.Tensor, detail: str, floor: Floor, *, wrong: str | None = None
) -> Check:
    """Compares logits [B, S, V] token by token; the check has the figures of the token that is off the most.

    `wrong` says what is the matter where they differ.
    """
    if got.shape != wanted.shape:
        return exactly(name, f"{wrong or detail}: {list(got.shape)} against {list(wanted.shape)}", detail)
    errors, allowed = distance(got, wanted).flatten(), floor.allowed.flatten()
    worst = int(torch.where(errors > 0, errors / allowed, 0.0).nan_to_num(nan=float("inf")).argmax())
    passed = bool((errors <= allowed).all())
    size = spread(wanted.flatten(0, 1)[worst])
    error, tolerance = float(errors[worst]) / size, float(allowed[worst]) / size
    return Check(name, passed, True, error, tolerance, detail if passed or wrong is None else wrong)
