"""The wait of a step for its data, where tokens are made while the training runs."""

from __future__ import annotations

import time

from minitron.runtime.interrupt import Interrupt
from minitron.runtime.setup import Run
from minitron.specs.one_line import plural
from minitron.specs.progress import Task

_POLL_SECONDS = 0.1


def wait_for_data(run: Run, step: int, interrupt: Interrupt, task: Task) -> bool:
    """Waits until all ranks have the data of a step. Returns False where a signal asks the training to end before that.

    The reason for which the data will not come is raised on all ranks: WorkError as for tokenizing, Refused for a token
    that the models have no row for.
    """
    arrivals, world = run.arrivals, run.world
    if arrivals is None:
        return True
    while True:
        arrivals.poll()
        missing, failed, stop = world.any_of(not run.feed.ready(step), arrivals.error is not None, interrupt.requested)
        if failed:
            world.raise_together(arrivals.error)
        if stop or not missing:
            return not missing
        task.advance(0, **arriving(run))
        time.sleep(_POLL_SECONDS)


def arriving(run: Run) -> dict[str, str | None]:
    """Returns what is shown of the tokens that are made beside the training; None where that has ended."""
    if run.arrivals is None:
        return {}
    return {"tokenized": None if run.arrivals.complete else plural(run.arrivals.documents, "document")}
