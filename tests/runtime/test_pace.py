"""The time that a training will still take."""

from __future__ import annotations

import pytest

from minitron.runtime import loop
from minitron.runtime.loop import Pace


def test_the_first_step_does_not_count_and_what_lies_between_steps_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step of 100 seconds; then each takes a second, and a held-out loss after each another."""
    clock = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    pace = Pace(1000)
    assert pace.seconds_left(100, rate=1.0) == 900.0, "nothing else is known yet"
    for done in (200, 300, 400):
        clock[0] += 2.0
        assert pace.seconds_left(done, rate=100.0) == (1000 - done) / 50
    clock[0] += 2.0
    assert pace.seconds_left(1000, rate=100.0) == 0.0


def test_a_training_that_goes_on_counts_from_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    pace = Pace(1000)
    pace.seconds_left(800, rate=10.0)
    clock[0] += 1.0
    assert pace.seconds_left(900, rate=10.0) == 1.0
