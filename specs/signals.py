"""The signals that ask a command to end."""

from __future__ import annotations

import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, the end that schedulers send, a terminal that was closed, and what Slurm sends before its time limit."""
