"""The `weights` check: every element of every tensor in student/ is the one of the teacher that plan.json keeps."""

from __future__ import annotations

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.verify.checks import Check, broken, exactly
from minitron.compiler.verify.hugging_face import NotRunnable
from minitron.compiler.verify.routes import Routes
from minitron.compiler.verify.written_weights import Written, files_of, first_difference
from minitron.specs.builds import STUDENT
from minitron.specs.errors import WorkError


def weights(routes: Routes) -> Check:
    """Compares the files; of a checkpoint whose tensors transformers converts, what it makes of them."""
    subject = routes.subject
    repairs = {name: recipe for name, recipe in subject.student.recipes.items() if recipe.scale != 1.0}
    try:
        written = files_of(subject.build / STUDENT) if subject.source.streamed else _converted(routes)
        found = first_difference(subject.teacher, subject.original.held, subject.selection, repairs, written)
    except NotRunnable:
        raise
    except WorkError as error:
        return broken("weights", error)
    # Weights that are changed before they are cut have a hash of how.
    changed = ", as basis and recovery have changed it" if hasattr(subject.original.source, "digest") else ""
    return exactly("weights", found, f"every element of student/ is the teacher's that plan.json keeps{changed}")


def _converted(routes: Routes) -> Written:
    tensors = stored_tensors(routes.model)
    return Written(frozenset(tensors), lambda name: tensors[name].detach(), exact=False)
