"""The `masked` check: the teacher with everything dropped set to zero equals the student."""

from __future__ import annotations

from minitron.compiler.roles.names import LAYERS
from minitron.compiler.roles.residual_stream import skip_layers
from minitron.compiler.verify.checks import Check, skipped
from minitron.compiler.verify.comparison import compare, measured
from minitron.compiler.verify.masked_reference import NoReference, masked_reference
from minitron.compiler.verify.perturbed import perturbed
from minitron.compiler.verify.routes import Routes


def masked(routes: Routes) -> Check:
    """Compares the rewritten graph with the teacher's, whose norms and choices are taken of what is kept."""
    subject = routes.subject
    teacher, student = subject.teacher, subject.student
    try:
        reference = masked_reference(teacher.captured.graph_module, teacher.table, student.narrowing)
    except NoReference as error:
        return skipped("masked", str(error))
    if subject.rescaled:
        # All weights at zero would end the residual stream at such a layer: skipping it is what was asked for.
        dropped = set(range(teacher.captured.layer_count)) - {*subject.selection[LAYERS][0]}
        skip_layers(reference.graph, teacher.ends, dropped)
    (expected,) = routes.teacher.graph(reference, subject.masked, subject.original.buffers)
    pruned = routes.rewritten
    if student.repaired and teacher.captured.dtype != subject.original.settings.dtype:
        # Folded constants were rounded once more for student/: compared is what they are before that.
        (pruned,) = routes.teacher.graph(student.graph_module, subject.unrounded, student.buffers)
    detail = "teacher with everything dropped set to zero against the rewritten graph"
    check = compare("masked", expected, pruned, detail, routes.floor)
    if check.passed:
        return check
    # The teacher is the wider one of the two: its sums are longer, and what rounding makes of it may be more.
    (moved,) = routes.teacher.graph(reference, perturbed(subject.masked), subject.original.buffers)
    return compare("masked", expected, pruned, detail, routes.floor.or_more(measured(moved, expected)))
