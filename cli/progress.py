"""Progress on stderr: a bar with rate and time left on a terminal, plain lines with the same figures elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.table import Table
from rich.text import Text

from minitron.cli import figures
from minitron.specs.one_line import one_line
from minitron.specs.progress import Progress, Task

# A line is written when this much time or this share of the work has passed since the last one, and not before
# LEAST_SECONDS: a log of a short task stays readable, and one that is read live still moves.
LINE_SECONDS = 10.0
LINE_SHARE = 0.1
LEAST_SECONDS = 1.0
# Over days a line every ten seconds would be a log of its own: the interval grows with the time that has passed.
LINE_ELAPSED_SHARE = 0.01

# As many figures of a task stand beside its bar; more would not fit into the line of a terminal, and get a panel.
IN_LINE = 2


def progress_for(console: Console, stamp: Callable[[], str] = str) -> Progress:
    """Returns the progress display for `console` (that of stderr): bars on a terminal, else lines that begin with
    `stamp()`.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        return BarProgress(console)
    return LineProgress(console.file, stamp=stamp)


class LineProgress:
    """Plain lines for a pipe or a log: `train: 1.20M of 3.00M tokens (40%), 4.10k tokens/s, 7m19s left, loss 2.31`."""

    def __init__(
        self, stream: IO[str], clock: Callable[[], float] = time.monotonic, stamp: Callable[[], str] = str
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._stamp = stamp

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        """Opens a task; prints one line at once where earlier work is continued, and one at its end."""
        if done:
            self.message(f"{name}: goes on at {_amount(done, total, unit)}")
        lines = _LineTask(self.message, self._clock, name, total, unit, done)
        yield lines
        lines.finish()

    def message(self, text: str) -> None:
        """Prints one plain line."""
        self._stream.write(f"{self._stamp()}{one_line(text)}\n")
        self._stream.flush()


class _LineTask:
    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], name: str, total: float, unit: str, done: float
    ) -> None:
        self._say, self._clock = say, clock
        self._name, self._total, self._unit = name, total, unit
        self._done = self._done_before = self._done_said = done
        self._started = self._said = clock()
        self._figures: dict[str, float | str] = {}

    def advance(self, amount: float = 1.0, **shown: float | str | None) -> None:
        self._done += amount
        self._figures = _updated(self._figures, shown)
        now = self._clock()
        since = now - self._said
        if since < LEAST_SECONDS or self._done >= self._total:
            return
        interval = max(LINE_SECONDS, LINE_ELAPSED_SHARE * (now - self._started))
        if since >= interval or self._done - self._done_said >= LINE_SHARE * self._total:
            self._say(self._line(now))
            self._said, self._done_said = now, self._done

    def finish(self) -> None:
        elapsed = self._clock() - self._started
        parts = [_amount(self._done, self._total, self._unit), f"done in {figures.duration(elapsed)}"]
        self._say(f"{self._name}: " + ", ".join([*parts, *_words(self._figures)]))

    def _line(self, now: float) -> str:
        rate = (self._done - self._done_before) / (now - self._started)
        parts = [_amount(self._done, self._total, self._unit)]
        if rate > 0:
            parts.append(f"{figures.short(rate)} {self._unit}/s")
            parts.append(f"{figures.duration(max(0.0, self._total - self._done) / rate)} left")
        return f"{self._name}: " + ", ".join([*parts, *_words(self._figures)])


class _Panels(Bars):
    """Bars below each other; those of tasks with many figures are followed by a panel with these."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if len(task.fields["figures"]) > IN_LINE:
                yield Panel.fit(_grid(task.fields["figures"]), title=task.description, border_style="dim")


def _grid(values: dict[str, float | str]) -> Table:
    """Returns a table with the names above their values."""
    names, texts = zip(*(figures.measured(key, one) for key, one in values.items()), strict=True)
    table = Table.grid(padding=(0, 3))
    table.add_row(*(Text(name, style="dim") for name in names))
    table.add_row(*(Text(text, style="bold") for text in texts))
    return table


class BarProgress:
    """Bars on a terminal, the figures of training in a panel of their own. Tasks may be nested; each has its bar."""

    def __init__(self, console: Console) -> None:
        self._bars = _Panels(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Words(),
            console=console,
            # One refresh more than once a blink costs time on the few cores that do the work.
            refresh_per_second=4,
        )
        self._open = 0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        """Opens a bar; the display starts with the first open task and ends with the last."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        identifier = self._bars.add_task(name, total=total, unit=unit, before=done, figures={})
        self._bars.update(identifier, completed=done)
        try:
            yield _Bar(self._bars, identifier)
        finally:
            self._open -= 1
            if self._open == 0:
                self._bars.stop()
                # What is finished stays on the screen as it is; the next display starts empty below it.
                for one in list(self._bars.task_ids):
                    self._bars.remove_task(one)

    def message(self, text: str) -> None:
        """Prints one plain line above the bars."""
        self._bars.console.print(Text(one_line(text)), soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, identifier: TaskID) -> None:
        self._bars, self._identifier = bars, identifier
        self._figures: dict[str, float | str] = {}

    def advance(self, amount: float = 1.0, **shown: float | str | None) -> None:
        self._figures = _updated(self._figures, shown)
        self._bars.update(self._identifier, advance=amount, figures=dict(self._figures))


class _Words(ProgressColumn):
    """The column of one bar's amount, rate, time left and figures."""

    def render(self, task: BarTask) -> Text:
        unit = task.fields["unit"]
        parts = [_amount(task.completed, task.total or 0.0, unit)]
        elapsed = task.elapsed or 0.0
        rate = (task.completed - task.fields["before"]) / elapsed if elapsed else 0.0
        if rate > 0:
            parts.append(f"{figures.short(rate)} {unit}/s")
            left = None if task.finished else figures.duration((task.total or 0.0) / rate - task.completed / rate)
            parts.append(f"{left} left" if left else f"in {figures.duration(elapsed)}")
        shown = task.fields["figures"]
        return Text(", ".join([*parts, *(_words(shown) if len(shown) <= IN_LINE else ())]))


def _amount(done: float, total: float, unit: str) -> str:
    share = f" ({100 * done / total:.0f}%)" if total else ""
    return f"{figures.short(done)} of {figures.short(total)} {unit}{share}"


def _updated(figures: dict[str, float | str], shown: Mapping[str, float | str | None]) -> dict[str, float | str]:
    """Returns the figures with those that are shown from now on; None: no longer."""
    return {key: value for key, value in {**figures, **shown}.items() if value is not None}


def _words(values: dict[str, float | str]) -> tuple[str, ...]:
    return tuple(" ".join(figures.measured(key, one)) for key, one in values.items())
