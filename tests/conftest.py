"""What the tests of the compiler and of the zoo share. Nothing here imports torch before it is asked for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.foundry import Foundry

# Builds that lie beside each other share scores and tokens: a test would find what another one made.
os.environ["MINITRON_CACHE"] = "none"

# A shell that starts its work in the background has it ignore Ctrl-C, and children inherit that: the tests that send the
# signal would then find that nothing happens, whatever the program does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def foundry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foundry]:
    """Tiny teachers and their compiles. One thread: the models are smaller than what it costs to share them."""
    import torch

    from tests.foundry import Apprentice, Foundry

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    apprentice = Apprentice()
    yield Foundry(tmp_path_factory.mktemp("foundry"), apprentice)
    apprentice.close()
    torch.set_num_threads(threads)
