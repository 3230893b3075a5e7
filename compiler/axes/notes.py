"""The kinds of notes that operators leave on an axis that they reduce or normalise."""

from __future__ import annotations

# Notes of these kinds are of operators that choose; and the operators.
CHOICES = ("softmax", "topk", "max", "amax", "logsumexp")
