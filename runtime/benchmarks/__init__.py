"""Benchmarks: the tasks, their local data, and how they are run."""
