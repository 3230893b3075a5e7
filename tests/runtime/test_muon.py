"""Muon: which weights are its, what an update is, and that it is stored and resumed as AdamW is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.runtime.models import LanguageModel
from minitron.runtime.muon import Muon, layer_matrices, orthogonalise
from minitron.runtime.optimizer import make_optimizer, moments_like
from minitron.specs.blocks.training import Optimizer, is_matrix
from minitron.specs.training_plan import HeadPlan
from tests.runtime.learning import learn, resumes_to_the_byte

HEAD = HeadPlan(backbone="layers", module="head", weight="head.weight", bias=None, scale=1.0, softcap=None)
MUON = Optimizer(name="muon", lr=1e-2)


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layer = torch.nn.Sequential(torch.nn.Linear(40, 90), torch.nn.LayerNorm(90), torch.nn.Linear(90, 40, bias=False))
    return torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(100, 40), "layers": torch.nn.ModuleList([layer]), "head": torch.nn.Linear(40, 100)}
    )


def matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return layer_matrices(LanguageModel(module, HEAD, "layers"))


def muon(module: torch.nn.Module, settings: Optimizer = MUON, **more: Any) -> torch.optim.Optimizer:
    return make_optimizer(module, settings, matrices=matrices(module), **more)


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("shape", [(30, 30), (20, 70), (70, 20), (3, 40, 24)])
def test_all_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = singular_values(orthogonalise(torch.randn(shape)))
    # The smallest of a square matrix are near 0, which no few iterations lift.
    assert float(found.max()) < 1.3 and float(found.quantile(0.1)) > 0.5


def test_a_stack_is_each_of_its_matrices_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 12, 20)
    stack[1] = 0.0
    torch.testing.assert_close(orthogonalise(stack), torch.stack([orthogonalise(one) for one in stack]))
    assert not bool(orthogonalise(stack)[1].any())


def test_the_matrices_of_the_layers_are_muons_and_nothing_else() -> None:
    module = model()
    assert {id(one) for one in matrices(module)} == {id(module.layers[0][0].weight), id(module.layers[0][2].weight)}
    assert is_matrix((8, 4)) and is_matrix((2, 8, 4))
    assert not is_matrix((8, 1, 4)) and not is_matrix((8,)) and not is_matrix((8, 1)) and not is_matrix((2, 3, 4, 5))


def test_all_other_weights_learn_as_with_adamw() -> None:
    one, other = model(), model()
    learn(one, muon(one), range(4))
    learn(other, make_optimizer(other, Optimizer(lr=1e-2)), range(4))
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        same = torch.allclose(parameter, others[name], rtol=1e-5, atol=1e-6)
        assert same != (name in ("layers.0.0.weight", "layers.0.2.weight")), name


def test_a_matrix_learns_as_with_torchs_own_muon() -> None:
    """torch computes the iterations in bf16, so that an update differs by a few hundredths."""
    one, other = model(), model()
    learn(one, muon(one), range(3))
    theirs = matrices(other)
    peer = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    learn(other, peer, range(3))
    begin = [one.detach() for one in matrices(model())]
    for mine, wanted, start in zip(matrices(one), theirs, begin, strict=True):
        moved, expected = mine.detach() - start, wanted.detach() - start
        assert float((moved - expected).norm() / expected.norm()) < 0.05


def test_a_matrix_has_one_moment_and_the_dry_pass_reserves_it() -> None:
    module = model()
    optimizer = muon(module)
    learn(module, optimizer, range(1))
    matrix, embedding = module.layers[0][0].weight, module.embed.weight
    assert set(optimizer.state[matrix]) == {"step", "exp_avg"}
    assert set(optimizer.state[embedding]) == {"step", "exp_avg", "exp_avg_sq"}
    assert [len(moments_like(optimizer, one)) for one in (matrix, embedding)] == [1, 2]


@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_that_was_interrupted_gives_the_same_bytes(states: Any, bf16: bool, tmp_path: Path) -> None:
    settings = MUON.model_copy(update={"states": states})

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        module = model()
        return module, muon(module, settings, bf16_weights=bf16, seed=7)

    assert isinstance(fresh()[1], Muon)
    resumes_to_the_byte(fresh, tmp_path)
