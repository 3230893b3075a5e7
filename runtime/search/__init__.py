"""Carries out the rungs of a search: candidates ride on one pass of the teacher, and the best of each rung stay."""

from minitron.runtime.search.rungs import search

__all__ = ["search"]
