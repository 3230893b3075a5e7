"""The `reload` check: the rewritten graph equals the model that transformers loads from student/."""

from __future__ import annotations

from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import compare
from minitron.compiler.verify.routes import Routes


def reload(routes: Routes) -> Check:
    """Compares the graph on weights in memory, which never saw the student's code, with that code on the files."""
    loaded = routes.loaded  # first: what does not load needs no other side
    detail = f"rewritten graph against student/ loaded by transformers{routes.wide.note}"
    return compare("reload", routes.rewritten, loaded, detail, routes.floor)
