"""What two routes may differ by is measured: token by token, and as close as their last bits."""

from __future__ import annotations

import pytest
import torch

from minitron.compiler.verify.comparison import MARGIN, Floor, compare, distance, measured
from minitron.compiler.verify.perturbed import perturbed
from tests.foundry import Foundry

NOISE = 1e-6


def floor(rows: int = 1, tokens: int = 3) -> Floor:
    return Floor(torch.full((rows, tokens), NOISE))


def logits() -> torch.Tensor:
    return torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))


def off(amount: float, token: int = 1, entry: int = 7) -> torch.Tensor:
    found = logits()
    found[0, token, entry] += amount
    return found


def test_what_rounding_makes_is_allowed_and_what_is_more_is_not() -> None:
    assert compare("x", off(0.5 * MARGIN * NOISE), logits(), "words", floor()).passed
    check = compare("x", off(3 * MARGIN * NOISE), logits(), "words", floor())
    assert not check.passed and check.max_error == pytest.approx(3 * check.tolerance, rel=0.05)


def test_a_large_logit_hides_nothing() -> None:
    """A bias of -1e4, as some heads have it for tokens that never come, has last bits of 1e-3; others have their own."""
    wanted, got = logits(), off(3 * MARGIN * NOISE)
    for one in (wanted, got):
        one[..., 0] = -1e4
    assert not compare("x", got, wanted, "words", floor()).passed
    got = wanted.clone()
    got[..., 0] += 1e-3
    assert compare("x", got, wanted, "words", floor()).passed


def test_a_token_of_much_noise_vouches_for_no_other() -> None:
    rows = torch.tensor([[NOISE, NOISE, 1000 * NOISE]])
    assert compare("x", off(100 * MARGIN * NOISE, token=2), logits(), "words", Floor(rows)).passed
    assert not compare("x", off(100 * MARGIN * NOISE, token=1), logits(), "words", Floor(rows)).passed


def test_small_logits_are_looked_at_as_closely() -> None:
    tiny = 1e-9
    check = compare("x", torch.zeros(1, 3, 50), tiny * logits(), "words", Floor(tiny * floor().rows))
    assert not check.passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_never_passes(value: float) -> None:
    good, bad = logits(), logits()
    bad[0, 1, 3] = value
    for check in (compare("x", bad, good, "words", floor()), compare("x", good, bad, "words", floor())):
        assert not check.passed
        assert check.to_json()["max_error"] is None and str(check) == "`x`: words"


def test_other_shapes_never_pass() -> None:
    check = compare("x", torch.ones(1, 1, 4), torch.ones(1, 2, 4), "words", floor())
    assert not check.passed and "[1, 1, 4] against [1, 2, 4]" in check.detail


def test_what_is_wrong_is_told_only_where_it_is() -> None:
    assert compare("x", logits(), logits(), "words", floor(), wrong="it is broken").detail == "words"
    assert compare("x", off(1.0), logits(), "words", floor(), wrong="it is broken").detail == "it is broken"


def test_a_moved_weight_differs_by_its_last_bit_and_always_in_the_same_way() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    moved = perturbed(lambda name: weight)
    relative = ((moved("a").double() - weight.double()) / weight.double()).abs()
    assert float(relative.max()) <= 2 * torch.finfo(torch.float32).eps and float((relative > 0).float().mean()) > 0.9
    assert torch.equal(moved("a"), moved("a")) and not torch.equal(moved("a"), moved("b"))
    ids = torch.arange(3)
    assert perturbed(lambda name: ids)("ids") is ids


def test_the_floor_of_a_linear_function_is_what_its_sums_round_to() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(64, 512, generator=generator), torch.randn(2, 5, 512, generator=generator)
    rounded = distance(x @ weight.T, (x.double() @ weight.double().T).float())
    found = measured(x @ perturbed(lambda name: weight)("w").T, x @ weight.T)
    assert float((rounded / found.allowed).max()) < 1
    assert float((found.allowed / (x @ weight.T).abs().amax(-1)).max()) < 1e-4


def test_an_error_of_a_ten_thousandth_does_not_pass(foundry: Foundry) -> None:
    """Good students were off by 1e-6 where 8e-5 passed."""
    checks = foundry.build(foundry.teacher("llama", num_hidden_layers=2), {"hidden_size": 24}, program=False).checks
    allowed = [one["tolerance"] for one in checks.values() if one["tolerance"]]
    assert len(allowed) >= 6 and max(allowed) < 8e-5
