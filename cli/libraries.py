"""Keeping the libraries below from talking past our own messages."""

from __future__ import annotations

from minitron.cli import output


def quiet_libraries() -> None:
    """Turns off the bars and the advice that transformers prints while it loads a model; imports transformers.

    With `--verbose` they speak. Downloads from the Hub keep their bars: they are long, and nothing else shows how far they are.
    """
    if output.verbose():
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
