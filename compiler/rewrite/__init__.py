"""Graph passes: each a file, each with a checked postcondition. `compile.rewrite` runs them in order."""

from minitron.compiler.rewrite.passes import Pass, PassFailed, run_passes

__all__ = ["Pass", "PassFailed", "run_passes"]
