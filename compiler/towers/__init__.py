"""Checkpoints of several towers: the language tower as a model of its own, and its student back among the others."""
