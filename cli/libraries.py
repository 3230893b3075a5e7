"""The control of what libraries print beside our own messages."""

from __future__ import annotations

import logging

from minitron.cli import output

_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers of what transformers imports where it is installed: torchao says that it lacks kernels of other devices, and
torch that torchao uses an older call."""


def quiet_imports() -> None:
    """Turns off what libraries log about themselves while they are imported, unless with `--verbose`. Imports none of them."""
    if not output.verbose():
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Turns off the progress bars and the advice that transformers prints while it loads a model; imports transformers.

    With `--verbose` they stay on. Downloads from the Hub keep their bars: they take long, and nothing else shows their
    progress.
    """
    if output.verbose():
        return
    quiet_imports()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
