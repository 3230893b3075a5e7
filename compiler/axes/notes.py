"""The kinds of notes that operators leave on an axis which they take together."""

from __future__ import annotations

# Notes of these kinds are of operators that choose; and the operators.
CHOICES = ("softmax", "topk", "max", "amax", "logsumexp")
