"""The signals that ask a command to end, and the processes that pass them on."""

from __future__ import annotations

import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, the end that schedulers send, a terminal that was closed, and what Slurm sends before its time limit."""

ECHO_SECONDS = 5.0
"""The seconds within which several signals count as one request: Ctrl-C goes to all processes of a terminal and a launcher
passes it on to its own, and so do Slurm and torchrun with SIGTERM.
"""

LAUNCHER = "MINITRON_LAUNCHER"
"""The environment variable that tells a process which of ours has started it among several: that one's process id."""
