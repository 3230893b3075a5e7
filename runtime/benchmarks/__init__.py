"""Benchmarks: which tasks there are, where their data lies, how they are run."""
