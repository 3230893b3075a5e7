"""Weights that several layers share are scored by all of their uses."""

from __future__ import annotations

import pytest
import torch

from minitron.compiler.importance.scores import Aggregation, WidthConfig
from tests.compiler import test_sample_rows
from tests.compiler.test_calibrate import aggregate, close, scores
from tests.compiler.test_sample_rows import Hooks
from tests.foundry import Foundry, token_ids
from tests.models import save_teacher
from tests.zoo.configs import config_of


@pytest.mark.parametrize(("batch", "sequence"), [("l2", "mean"), ("mean", "l2")])
def test_the_heads_of_a_block_that_two_layers_share(
    foundry: Foundry, monkeypatch: pytest.MonkeyPatch, batch: Aggregation, sequence: Aggregation
) -> None:
    """Two layers run one block on other values: what transformers' own module reads in both, each use as further samples."""
    folder = foundry.root / "shared-layers"
    teacher = folder if folder.exists() else save_teacher(folder, config_of("zamba"))
    plan = foundry.plan(teacher, {"num_hidden_layers": 4})
    assert plan.teacher.captured.length is not None, "the graph of a scan is of one length"
    ids = token_ids(4, plan.teacher.captured.length, seed=3)
    monkeypatch.setattr(test_sample_rows, "SAMPLES", ids)
    hooks, got = Hooks(plan), scores(plan, ids, width=WidthConfig(batch, sequence)).heads
    first, second = (used for name, used in hooks.plain.items() if name.endswith("o_proj"))
    assert len(first) == len(second) == len(ids), "two layers"

    def of_heads(used: list[torch.Tensor]) -> torch.Tensor:
        channels = aggregate(torch.cat(used), sequence, batch)
        return channels.reshape(site.groups, site.repeats, -1).norm(dim=-1)

    assert got
    for layer, score in got.items():
        site = plan.teacher.roles.heads[layer]
        close(score, of_heads([*first, *second]))
        with pytest.raises(AssertionError):
            close(score, of_heads(first))
