"""The `causality` check: the logits of earlier tokens do not depend on the last one."""

from __future__ import annotations

from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import Floor, compare
from minitron.compiler.verify.teacher_routes import TeacherRoutes


def causality(routes: TeacherRoutes) -> Check | None:
    """Compares with the logits under another last token; None of sequences of one token."""
    if routes.ids.shape[1] < 2:
        return None
    still, moved = (logits[:, :-1] for logits in routes.both)
    detail = "logits of earlier tokens with another token at the end against what they were"
    wrong = (
        "an earlier token's logits change with the last token: this decoder looks ahead, so it predicts no next token; "
        "look for a key of its configuration that makes attention bidirectional"
    )
    return compare("causality", moved, still, detail, Floor(routes.floor.rows[:, :-1]), wrong=wrong)
