"""One request to stop may arrive several times; whoever asks again later is in a hurry."""

from __future__ import annotations

import signal

import pytest

from minitron.runtime.interrupt import Interrupt, interrupts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_signal_that_is_passed_on_is_one_request() -> None:
    """Ctrl-C in a terminal reaches every process, and torchrun sends it to its own once more."""
    clock = Clock()
    interrupt = Interrupt(clock)
    with interrupt.deferring():
        interrupt.on_signal(signal.SIGINT, None)
        clock.now += 0.2
        interrupt.on_signal(signal.SIGINT, None)
    assert interrupt.requested


def test_who_asks_again_is_not_kept_waiting() -> None:
    clock = Clock()
    interrupt = Interrupt(clock)
    with interrupt.deferring():
        interrupt.on_signal(signal.SIGTERM, None)
        clock.now += 10
        with pytest.raises(KeyboardInterrupt):
            interrupt.on_signal(signal.SIGINT, None)


def test_where_nothing_has_to_be_saved_first_it_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        Interrupt().on_signal(signal.SIGTERM, None)


def test_what_is_ignored_stays_ignored() -> None:
    """As Ctrl-C is for a job in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert not interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
