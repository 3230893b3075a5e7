"""The `teacher` check: the captured graph, on the weights that were read, is the model that transformers loads."""

from __future__ import annotations

from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.comparison import compare
from minitron.compiler.verify.hugging_face import NotRunnable
from minitron.compiler.verify.teacher_routes import TeacherRoutes


def teacher(routes: TeacherRoutes) -> Check:
    """Compares with the model of the teacher's folder as any user loads it: its files, its code and its
    kernels, but for the keys of its configuration that only change how it is called, which no student has."""
    captured = routes.original.teacher.captured
    kind = captured.config.model_type
    try:
        loaded = routes.loaded
    except NotRunnable as error:
        return exactly("teacher", str(error), "")
    wrong = (
        f"the graph of this {kind}, captured with {captured.attention} attention, is not the function of the model that "
        "transformers loads from the teacher's folder: one of its kernels computes something else, or its files are read "
        "in another way"
    )
    detail = f"captured graph on the weights that were read against the model that transformers loads{routes.wide.note}"
    return compare("teacher", routes.whole, loaded, detail, routes.floor, wrong=wrong)
