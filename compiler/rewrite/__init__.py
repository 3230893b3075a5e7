"""Graph passes: each a file, each with a checked postcondition. `narrow_graph` is their order."""

from minitron.compiler.rewrite.passes import Pass, PassFailed, run_passes

__all__ = ["Pass", "PassFailed", "run_passes"]
