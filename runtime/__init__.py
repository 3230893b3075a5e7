"""Turns a build folder into a trained and evaluated model. Reads training.yaml and nothing else."""

from minitron.runtime.evaluate import evaluate
from minitron.runtime.record import record
from minitron.runtime.search import search
from minitron.runtime.train import train

__all__ = ["evaluate", "record", "search", "train"]
