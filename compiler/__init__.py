"""The compiler: spec and teacher -> build folder."""

from minitron.compiler.compilation import Work
from minitron.compiler.compile import compile_spec
from minitron.compiler.estimate.hardware import read_hardware
from minitron.compiler.export_whole import export_whole
from minitron.compiler.importance.ranks import join_ranks
from minitron.compiler.plan.plan import Plan
from minitron.compiler.plan_document import plan_document
from minitron.compiler.planning import SearchPlan, make_plan, make_search
from minitron.compiler.teacher.freshness import staleness, why_stale
from minitron.compiler.teacher.lock import apply_lock, make_lock
from minitron.compiler.teacher.open_teacher import why_not_finished
from minitron.compiler.verify_build import verify_build
from minitron.compiler.write_search import write_search

__all__ = [
    "Plan",
    "SearchPlan",
    "Work",
    "apply_lock",
    "compile_spec",
    "export_whole",
    "join_ranks",
    "make_lock",
    "make_plan",
    "make_search",
    "plan_document",
    "read_hardware",
    "staleness",
    "verify_build",
    "why_not_finished",
    "why_stale",
    "write_search",
]
