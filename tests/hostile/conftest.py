"""The fixtures of the runtime's tests: a fresh tiny build."""

from tests.runtime.conftest import build, one_thread, tiny_build

__all__ = ["build", "one_thread", "tiny_build"]
