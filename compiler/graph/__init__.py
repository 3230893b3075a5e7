"""Graphs of operators: holding them, naming their parts, running them. Knows no model."""
