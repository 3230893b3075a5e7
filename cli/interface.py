"""The Python interface (`import minitron`): the commands' steps as functions. Their results are objects that display
themselves in a terminal and in a notebook as the commands do.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from minitron.cli import builds
from minitron.cli.build_sections import build_sections
from minitron.cli.consoles import stderr_console
from minitron.cli.device import pick_device, use_threads
from minitron.cli.libraries import quiet_libraries
from minitron.cli.lock_command import follow_lock
from minitron.cli.markdown import markdown
from minitron.cli.plan_summary import shown_plan
from minitron.cli.progress import progress_for
from minitron.cli.render import terminal
from minitron.cli.search_command import chosen_plan, is_compiled, opened_search
from minitron.cli.sections import Document, Section
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.builds import MODEL, STUDENT
from minitron.specs.progress import Progress, Silent

if TYPE_CHECKING:
    from minitron.compiler import Plan as CompilerPlan

# Columns of a table that is printed: wide enough for a reason in a plan.
_WIDTH = 160


class _Shown(ABC):
    """A result that displays itself as sections: `print` writes tables, a notebook renders markdown."""

    @abstractmethod
    def sections(self) -> list[Section]:
        """Returns the sections to display."""

    def __str__(self) -> str:
        console = Console(width=_WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
        with console.capture() as captured:
            console.print(terminal(self.sections()))
        return captured.get()

    def _repr_markdown_(self) -> str:
        return markdown(self.sections())


@dataclass(frozen=True, repr=False)
class Plan(_Shown):
    """The plan of a spec for its teacher: the preview that `minitron plan` prints."""

    spec: LoadedSpec
    """The spec, under its lock file where it has one."""
    build: Path
    """The folder that the spec would be compiled into."""
    document: Document
    """The document that `minitron plan --json` prints (docs/json.md)."""
    resolved: CompilerPlan = field(compare=False)
    """The compiler's own plan, which a compile continues from."""

    @property
    def teacher(self) -> Document:
        """Parameters, bytes, FLOPs and widths of the teacher."""
        return dict(self.document["teacher"])

    @property
    def student(self) -> Document:
        """Parameters, bytes, FLOPs and widths of the student."""
        return dict(self.document["student"])

    @property
    def stale(self) -> str | None:
        """The reason why the build folder is not what this spec compiles to; None where it is up to date."""
        from minitron.compiler import why_stale

        return why_stale(self.build, self.spec)

    def sections(self) -> list[Section]:
        """Returns the sections that `minitron plan` prints."""
        return shown_plan(self.document, full=False)

    def __repr__(self) -> str:
        return f"<Plan of {self.spec.path}>"


@dataclass(frozen=True, repr=False)
class Build(_Shown):
    """A build folder. `Build("builds/NAME")` opens one that was compiled before; UsageError where no build
    is there."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", builds.require_build(Path(self.path)))

    def verify(self, *, device: str | None = None, threads: int | None = None, quiet: bool = False) -> Document:
        """Runs every check of a compile on the build as it lies there and returns `verification`; WorkError where one fails."""
        from minitron.compiler import verify_build

        verify_build(self.path, **_work(device, threads, quiet))
        return self.verification or {}

    def capture(
        self,
        *,
        device: str | None = None,
        threads: int | None = None,
        quiet: bool = False,
        outside: bool = False,
    ) -> Document:
        """Stores samples of the teacher's distribution, for `teacher_logits: {sampled: N}`; returns {samples, tokens,
        bytes, folder}. Samples that exist are not drawn again. `outside` lets `work` lie outside of the build.
        """
        from minitron.runtime import record

        return record(self.path, **_work(device, threads, quiet), outside=outside)

    def train(
        self,
        *,
        device: str | None = None,
        threads: int | None = None,
        quiet: bool = False,
        unverified: bool = False,
        outside: bool = False,
    ) -> Document:
        """Executes the training plan and returns `training`; resumes an interrupted training and leaves a finished one
        as it is. `unverified` accepts a student whose verification is missing or failed, `outside` lets `work` and
        `output` lie outside of the build.

        UsageError where the spec has no `distill` block; WorkError for broken files, a full disk, a loss that is not finite.
        """
        from minitron.runtime import train

        builds.require_training_plan(self.path)
        train(self.path, **_work(device, threads, quiet), unverified=unverified, outside=outside)
        return self.training or {}

    def evaluate(
        self,
        *,
        device: str | None = None,
        threads: int | None = None,
        quiet: bool = False,
        unverified: bool = False,
        outside: bool = False,
    ) -> Document:
        """Measures teacher, pruned and distilled model side by side and returns `results`; `unverified` and `outside` are as
        for `train`."""
        from minitron.runtime import evaluate

        return evaluate(self.path, **_work(device, threads, quiet), unverified=unverified, outside=outside)

    def report(self) -> Path:
        """Writes report.html, one page with charts that needs no network, and returns its path."""
        from minitron.cli.report import write_report

        return write_report(self.path)

    @property
    def student(self) -> Path:
        """The folder of the pruned student, for `AutoModelForCausalLM.from_pretrained`."""
        return self.path / STUDENT

    @property
    def model(self) -> Path:
        """The folder of the distilled student, which exists once training is finished."""
        return self.path / MODEL

    @property
    def plan(self) -> Document | None:
        """The content of plan.json."""
        return self._document("plan")

    @property
    def verification(self) -> Document | None:
        """The content of verification.json: every check with its reference and its figures."""
        return self._document("verification")

    @property
    def training(self) -> Document | None:
        """The progress of the training, {total_tokens, steps, first, last}; None where none has begun."""
        return self._document("training")

    @property
    def results(self) -> Document | None:
        """The content of results.json; None before the first `evaluate`."""
        return self._document("results")

    def sections(self) -> list[Section]:
        """Returns the sections that `minitron show` prints."""
        return build_sections(builds.show_document(self.path))

    def _document(self, name: str) -> Document | None:
        document: Document | None = builds.show_document(self.path)[name]
        return document

    def __repr__(self) -> str:
        return f"Build({str(self.path)!r})"


def load_spec_file(path: Path, overrides: Mapping[str, Any] | Sequence[str]) -> LoadedSpec:
    """Loads a spec file; the implementation of `minitron.load`."""
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return load_spec(path, overrides)


def make_plan(
    spec: LoadedSpec | str | Path, build: str | Path | None, *, device: str | None, mfu: float | None, locked: bool
) -> Plan:
    """Plans a spec; the implementation of `minitron.plan`."""
    quiet_libraries()
    from minitron.compiler import make_plan as resolve
    from minitron.compiler import plan_document, read_hardware

    hardware = read_hardware(device, mfu, None)
    loaded = follow_lock(spec if isinstance(spec, LoadedSpec) else load_spec(Path(spec)), locked=locked)
    folder = builds.build_folder(None if build is None else Path(build), loaded)
    resolved = resolve(loaded, build=folder)
    return Plan(loaded, folder, plan_document(resolved, hardware=hardware), resolved)


def compile_into(
    spec: LoadedSpec | Plan | str | Path,
    build: str | Path | None,
    *,
    device: str | None,
    threads: int | None,
    locked: bool,
    fresh: bool,
    quiet: bool,
) -> Build:
    """Compiles a spec; the implementation of `minitron.compile`."""
    quiet_libraries()
    from minitron.compiler import compile_spec
    from minitron.compiler import make_plan as resolve

    if isinstance(spec, Plan):
        loaded, folder = spec.spec, spec.build
    else:
        loaded = follow_lock(spec if isinstance(spec, LoadedSpec) else load_spec(Path(spec)), locked=locked)
        folder = builds.build_folder(None, loaded)
    folder = folder if build is None else builds.build_folder(Path(build), loaded)
    work = _work(device, threads, quiet)
    if not fresh and is_compiled(loaded, folder):
        work["progress"].message(f"compile: {folder} is up to date with {loaded.path}, skipped")
        builds.tidy(folder)
        return Build(folder)

    def rungs(of: Path) -> None:
        from minitron.runtime import search

        search(of, **work)

    found = opened_search(loaded, folder)
    planned = None
    if fresh:  # the build that is there is moved once the spec is known to plan
        planned = resolve(loaded, build=folder, weights=True) if found is None else None
        builds.move_aside(folder)
    chosen = chosen_plan(found, work["device"], rungs, progress=work["progress"])
    compile_spec(loaded, folder, **work, plan=chosen or planned)
    return Build(folder)


def _work(device: str | None, threads: int | None, quiet: bool) -> dict[str, Any]:
    """Returns the device and the progress display of long work, as keyword arguments of compiler and runtime."""
    quiet_libraries()
    use_threads(threads)
    progress: Progress = Silent() if quiet else progress_for(stderr_console())
    return {"device": pick_device(device), "progress": progress}
