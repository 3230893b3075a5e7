"""The control of what libraries print beside our own messages."""

from __future__ import annotations

from minitron.cli import output


def quiet_libraries() -> None:
    """Turns off the progress bars and the advice that transformers prints while it loads a model; imports transformers.

    With `--verbose` they stay on. Downloads from the Hub keep their bars: they take long, and nothing else shows their
    progress.
    """
    if output.verbose():
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
