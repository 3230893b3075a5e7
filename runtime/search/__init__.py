"""Carries out the rungs of a search: candidates learn from one pass of the teacher, and the best of each rung stay."""

from minitron.runtime.search.rungs import search

__all__ = ["search"]
