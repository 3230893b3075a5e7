"""Progress: bars where somebody watches, a few plain lines where a file does."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from minitron.cli.progress import LINE_SECONDS, BarProgress, LineProgress, progress_for


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(*, steps: int, seconds: float, total: float = 1000.0, done: float = 0.0) -> list[str]:
    """What LineProgress writes about a task of `steps` equal steps that together take `seconds`."""
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock)
    with progress.task("train", total, "tokens", done) as task:
        for step in range(steps):
            clock.now += seconds / steps
            task.advance((total - done) / steps, loss=2.0 - step / steps, lr="1e-4")
    return stream.getvalue().splitlines()


def test_a_short_task_is_one_line() -> None:
    assert lines(steps=100, seconds=0.5) == ["train: 1.00k of 1.00k tokens (100%), done in 0s, loss 1.01, lr 1e-4"]


def test_a_line_has_amount_rate_time_left_and_figures() -> None:
    first = lines(steps=100, seconds=100)[0]
    assert first == "train: 100 of 1.00k tokens (10%), 10 tokens/s, 1m30s left, loss 1.91, lr 1e-4"


def test_a_figure_that_is_none_is_no_longer_shown() -> None:
    stream = io.StringIO()
    with LineProgress(stream, Clock()).task("train", 10, "tokens") as task:
        task.advance(5, loss=2.0, tokenized="7 documents")
        task.advance(5, tokenized=None)
    assert stream.getvalue().splitlines() == ["train: 10 of 10 tokens (100%), done in 0s, loss 2"]


@pytest.mark.parametrize("seconds", [5, 60, 600])
def test_lines_are_few(seconds: float) -> None:
    said = lines(steps=2000, seconds=seconds)
    assert len(said) <= max(11, seconds / LINE_SECONDS + 11)
    assert len(said) >= 5


def test_a_task_of_days_does_not_fill_a_disk_with_lines() -> None:
    assert len(lines(steps=20_000, seconds=4 * 86_400)) < 1000


def test_continued_work_says_where_it_goes_on_and_counts_only_its_own_rate() -> None:
    said = lines(steps=50, seconds=100, done=500)
    assert said[0] == "train: goes on at 500 of 1.00k tokens (50%)"
    assert "510 of 1.00k" not in said[1] and "5 tokens/s" in said[1]


def test_a_failed_task_is_not_said_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), LineProgress(stream, Clock()).task("train", 10, "steps"):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_a_task_of_unknown_size_has_no_share() -> None:
    stream = io.StringIO()
    with LineProgress(stream, Clock()).task("read", 0, "files") as task:
        task.advance(3)
    assert stream.getvalue() == "read: 3 of 0 files, done in 0s\n"


def terminal() -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, force_terminal=True, width=160, _environ={"TERM": "xterm"})


def test_a_terminal_gets_bars_and_a_pipe_gets_lines() -> None:
    assert isinstance(progress_for(terminal()[1]), BarProgress)
    assert isinstance(progress_for(Console(file=io.StringIO())), LineProgress)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(progress_for(dumb), LineProgress)


def test_bars_show_the_same_figures_and_end_complete() -> None:
    stream, console = terminal()
    progress = BarProgress(console)
    with progress.task("compile", 2, "passes") as outer:
        with progress.task("calibrate", 5, "layers", 2) as inner:
            inner.advance(3, loss=1.5)
        progress.message("a message [with brackets]")
        outer.advance(2)
    with progress.task("verify", 1, "checks") as task:
        task.advance()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"calibrate .*5 of 5 layers \(100%\).*loss 1\.5", plain)
    assert re.search(r"compile .*2 of 2 passes \(100%\)", plain)
    assert "a message [with brackets]" in plain
    # The second display starts empty: finished bars are not drawn again below it.
    assert "compile" not in plain.split("1 of 1 checks")[-1]


TRAINED: dict[str, float] = {"loss": 2.25, "held_out_loss": 2.5, "lr": 1e-4, "mfu": 0.4123, "memory_bytes": 3 << 30}


def test_training_has_one_panel_with_its_figures() -> None:
    stream, console = terminal()
    with BarProgress(console).task("train", 1000, "tokens") as task:
        task.advance(400, loss=3.0, lr=1e-5, memory_bytes=1 << 30)
        task.advance(600, **TRAINED)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).split("train ━")[-1]
    assert re.search(r"1\.00k of 1\.00k tokens \(100%\)", last) and "loss" not in last.splitlines()[0]
    _, title, names, values, *_ = last.splitlines()
    assert "train" in title
    assert re.findall(r"[^│ ]+(?: [^│ ]+)*", names) == ["loss", "lr", "memory", "held-out loss", "mfu"]
    assert re.findall(r"[^│ ]+(?: [^│ ]+)*", values) == ["2.25", "0.0001", "3.00 GiB", "2.5", "41.2%"]


def test_a_pipe_gets_the_same_figures_in_a_line() -> None:
    stream = io.StringIO()
    with LineProgress(stream, Clock()).task("train", 1000, "tokens") as task:
        task.advance(1000, **TRAINED)
    assert stream.getvalue().endswith("loss 2.25, held-out loss 2.5, lr 0.0001, mfu 41.2%, memory 3.00 GiB\n")


def test_bars_leave_the_terminal_as_it_was_when_work_is_interrupted() -> None:
    stream, console = terminal()
    with pytest.raises(KeyboardInterrupt), BarProgress(console).task("train", 10, "steps"):
        raise KeyboardInterrupt
    hidden, shown = stream.getvalue().rfind("\x1b[?25l"), stream.getvalue().rfind("\x1b[?25h")
    assert hidden < shown, "the cursor stays hidden"
