"""What is given back to the system between two stages of a compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron.compiler.graph.memory import release_heap

STATUS = Path("/proc/self/status")


def anonymous() -> int:
    """The bytes of anonymous memory that this process has."""
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read there")
def test_the_buffers_of_matrix_products_are_given_back() -> None:
    """MKL keeps 13 MB from a product like this one."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    release_heap()
    before = anonymous()
    torch.nn.functional.linear(torch.ones(512, 1536), torch.ones(8192, 1536))
    release_heap()
    assert anonymous() - before < 4 << 20
