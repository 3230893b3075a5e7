"""Carries out a search: the compiler writes the candidates, the runtime their rungs, and the best one is planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.cli import interrupts, options
from minitron.cli.device import pick_device, use_threads
from minitron.cli.libraries import quiet_libraries
from minitron.cli.output import progress as shown_progress
from minitron.cli.processes import process_count, process_options, results_wanted, start
from minitron.cli.ranks import first_process
from minitron.cli.render import say, show_sections
from minitron.cli.search_sections import candidates_section
from minitron.specs import LoadedSpec
from minitron.specs.builds import PLAN, read_document
from minitron.specs.errors import UsageError
from minitron.specs.progress import Progress
from minitron.specs.search_files import read_ranking, read_search, search_identity, table

if TYPE_CHECKING:
    from minitron.compiler import Plan, SearchPlan

Rungs = Callable[[Path], None]


def search(
    build: options.BuildFolder,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
) -> None:
    """Carry out the rungs of a search that `compile --prepare` has written, under torchrun on all processes."""
    quiet_libraries()
    chosen = pick_device(device)
    rungs(build, chosen, process_count(devices, chosen, device), threads)
    file, ranking = read_search(build), read_ranking(build)
    if first_process() and results_wanted() and file is not None and ranking is not None:
        rows = table([one.figures for one in file.candidates], ranking)
        show_sections([candidates_section({"winner": ranking.winner, "candidates": rows})], {})
        say("next: minitron compile SPEC, which takes the best one")


def rungs(build: Path, device: str, count: int, threads: int | None) -> None:
    """Carries out the rungs of a search in this process, or in `count` processes that it starts."""
    file = read_search(build)
    count = min(count, len(file.candidates)) if file is not None else 1
    if count > 1:
        start("search", build, count, *process_options(device, threads), results=False)
        return
    from minitron.runtime import search as carry_out

    use_threads(threads)
    carry_out(build, device=device, progress=shown_progress())


def opened_search(loaded: LoadedSpec, build: Path) -> SearchPlan | None:
    """Returns the search of a spec with its teacher opened; None for a spec without one."""
    if loaded.spec.search is None:
        return None
    from minitron.compiler import make_search

    return make_search(loaded, build=build, weights=True)


def is_compiled(loaded: LoadedSpec, build: Path, candidate: int | None = None) -> bool:
    """Checks whether a build is what its spec compiles to now: of a search, the student of `candidate` or of the best one."""
    from minitron.compiler import why_stale

    if why_stale(build, loaded) is not None:
        return False
    if loaded.spec.search is None:
        return candidate is None
    ranking = read_ranking(build, search_identity(loaded))
    wanted = candidate or (None if ranking is None else ranking.winner)
    compiled = ((read_document(build / PLAN) or {}).get("search") or {}).get("candidate")
    return wanted is not None and compiled == wanted


def chosen_plan(
    found: SearchPlan | None,
    device: str,
    carry_out: Rungs,
    *,
    candidate: int | None = None,
    progress: Progress | None = None,
) -> Plan | None:
    """Returns the plan of the student that a spec's search comes to: of `candidate` where the user names one, else of the
    best one, for which candidates are written and their rungs carried out. None for a spec without a search.
    """
    if found is None:
        if candidate is not None:
            raise UsageError("--candidate: the spec has no `search`, and so one student; leave it out")
        return None
    from minitron.compiler import write_search

    if candidate is not None:
        return found.plan(candidate)
    if not found.candidates.rungs:
        return found.plan(1)
    write_search(found, device=device, progress=progress or shown_progress())
    interrupts.check()
    carry_out(found.build)
    interrupts.check()
    ranking = read_ranking(found.build, search_identity(found.loaded))
    assert ranking is not None and ranking.winner is not None, "the rungs are done"
    return found.plan(ranking.winner)


def prepare(loaded: LoadedSpec, build: Path, device: str) -> None:
    """Writes the candidates of a search and no more."""
    found = opened_search(loaded, build)
    if found is None:
        raise UsageError("--prepare: the spec has no `search` to prepare; leave it out")
    from minitron.compiler import write_search

    write_search(found, device=device, progress=shown_progress())
    say(f"next: torchrun --nproc-per-node N -m minitron.cli search {build}, then minitron compile {loaded.path}")
