"""The compiler: spec and teacher -> build folder."""

from minitron.compiler.compile import compile_spec
from minitron.compiler.plan import Plan, make_plan

__all__ = ["Plan", "compile_spec", "make_plan"]
