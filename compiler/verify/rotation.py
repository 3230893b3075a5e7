"""The `rotation` check: the teacher on the principal components of its residual stream, all kept, is the teacher."""

from __future__ import annotations

from minitron.compiler.recovery.basis import rotated_reference
from minitron.compiler.recovery.rotated_weights import rotated_in
from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import compare
from minitron.compiler.verify.routes import Routes


def rotation(routes: Routes) -> Check | None:
    """Compares the teacher in its new basis, whole and with nothing fitted, with the teacher; None where it has none."""
    subject, captured = routes.subject, routes.subject.teacher.captured
    source = rotated_in(subject.source)
    if source is None:
        return None
    assert subject.rotation is not None
    graph_module, fetch = rotated_reference(captured.graph_module, subject.teacher.table, source, subject.rotation.tied)
    (whole,) = routes.teacher.captured(source.unrotated.get)
    (turned,) = routes.teacher.graph(graph_module, fetch, subject.original.buffers)
    detail = "the teacher on its principal components, all of them kept, against itself"
    return compare("rotation", turned, whole, detail, routes.teacher.floor)
