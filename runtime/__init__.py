"""Build folder -> trained, evaluated model. Reads training.yaml and nothing else."""

from minitron.runtime.capture import capture
from minitron.runtime.evaluate import evaluate
from minitron.runtime.train import train

__all__ = ["capture", "evaluate", "train"]
