"""The command `run`: everything from a spec to results, the specs of its teachers first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron.cli import builds, interrupts, options, search_command, steps
from minitron.cli.device import pick_device, use_threads
from minitron.cli.drafts import load_whole
from minitron.cli.libraries import quiet_libraries
from minitron.cli.lock_command import follow_lock
from minitron.cli.processes import process_count, process_options, sharing, start
from minitron.cli.ranks import only_process
from minitron.cli.render import say, show_sections, write
from minitron.cli.results_sections import results_sections
from minitron.cli.sections import Document
from minitron.specs import LoadedSpec
from minitron.specs.builds import RESULTS, read_document
from minitron.specs.chain import chain
from minitron.specs.errors import SpecInvalid, located
from minitron.specs.spec import float8_uses


def run(
    spec: options.SpecFile,
    output: options.Output = None,
    overrides: options.Overrides = None,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
    locked: options.Locked = False,
    fresh: options.Fresh = False,
) -> None:
    """Compile, train and evaluate, and before that the specs of its teachers; what is there is not done again."""
    only_process("run")
    loaded = load_whole(spec, overrides or (), compiles=True)
    build = builds.build_folder(output, loaded)
    quiet_libraries()
    chosen = pick_device(device)
    machine = _Machine(chosen, devices, threads, count=process_count(devices, chosen, device))
    for one in (*chain(loaded), loaded):
        _require_float8(one, machine.device)
    for upper in chain(loaded):
        _run_above(upper, machine, locked=locked)
    _make(loaded, build, machine, locked=locked, fresh=fresh)
    results = machine.evaluate(build)
    show_sections([*results_sections(results), steps.places(build)], results)
    steps.end_with_shortfalls(results)


def _require_float8(loaded: LoadedSpec, device: str) -> None:
    """Checks, before a compile, that the training after it can compute in float8. SpecInvalid where it cannot."""
    uses = float8_uses(loaded.spec)
    if any(compute == "float8" for compute, _ in uses):
        import torch

        from minitron.runtime.float8 import float8_problems

        if problems := list(float8_problems(uses, torch.device(device))):
            raise SpecInvalid(located(problems, loaded))


@dataclass(frozen=True)
class _Machine:
    """The devices that `run` works on: each step in this process, or in `count` processes that it starts."""

    device: str
    devices: str | None
    threads: int | None
    count: int

    def capture(self, build: Path) -> None:
        if self.count > 1:
            self._start("capture", build, self.count)
        else:
            steps.capture(build, self.device, self.threads)

    def search(self, build: Path) -> None:
        search_command.rungs(build, self.device, self.count, self.threads)

    def train(self, build: Path) -> None:
        if (count := sharing(build, self.count, self.devices)) > 1:
            self._start("train", build, count)
        else:
            steps.train(build, self.device, self.threads)

    def evaluate(self, build: Path) -> Document:
        if self.count == 1:
            return steps.evaluate(build, self.device, self.threads)
        self._start("eval", build, self.count)
        return read_document(build / RESULTS) or {}

    def _start(self, command: str, build: Path, count: int) -> None:
        start(command, build, count, *process_options(self.device, self.threads), results=False)


def _run_above(upper: LoadedSpec, machine: _Machine, *, locked: bool) -> None:
    """Compiles and trains the spec whose student is the teacher of another spec; its evaluation is left to a run of its
    own.
    """
    from minitron.compiler import why_not_finished

    if why_not_finished(upper) is None:
        say(f"{upper.path}: {upper.result} is finished and becomes the teacher, skipped")
        return
    say(f"{upper.path}: its result becomes the teacher, so it runs first")
    _make(upper, upper.build, machine, locked=locked)
    write("")


def _make(loaded: LoadedSpec, build: Path, machine: _Machine, *, locked: bool, fresh: bool = False) -> None:
    """Compiles where the build is missing or stale; captures and trains where the spec says so."""
    from minitron.compiler import staleness

    loaded = follow_lock(loaded, locked=locked)
    found = staleness(build, loaded)
    if found is None and not fresh:
        say(f"compile: {build} is up to date with {loaded.path}, skipped")
        builds.tidy(build)
    elif found is not None and not found.changed and not fresh:
        say(f"compile: {build} is {found.reason}; the edited values are taken, skipped")
    else:
        opened = search_command.opened_search(loaded, build)
        plan = steps.show_plan_first(loaded, build, machine.device, fresh=fresh, opened=opened)
        use_threads(machine.threads)
        chosen = search_command.chosen_plan(opened, machine.device, machine.search)
        steps.compile_build(loaded, build, machine.device, machine.threads, chosen or plan)
    interrupts.check()
    if loaded.spec.distill is None:
        say("train: the spec has no `distill` block, skipped")
    else:
        if loaded.spec.distill.teacher_logits != "online" and not builds.is_trained(build):
            machine.capture(build)
        machine.train(build)
    interrupts.check()
