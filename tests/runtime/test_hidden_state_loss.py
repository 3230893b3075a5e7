"""The distance of hidden states: values and gradients are those of the formulas, whatever the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.runtime.loss import HiddenStateLoss, hidden_state_loss
from tests.runtime.test_distillation_loss import LargestTensor

D, E, TOKENS, SEQUENCES = 6, 10, 14, 3


def states(width: int, seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def inputs(projected: bool, pairs: int = 2) -> dict[str, Any]:
    width = E if projected else D
    return {
        "students_TD": [states(D, pair).requires_grad_() for pair in range(pairs)],
        "teachers_TE": [states(width, 10 + pair) for pair in range(pairs)],
        "projection_ED": states(D, 20, E).requires_grad_() if projected else None,
        "logits_T": states(1, 30).squeeze(1).abs(),
        "sequence_T": torch.tensor([0] * 5 + [1] * 2 + [2] * 7),
        "sequences": SEQUENCES,
    }


def naive(settings: HiddenStateLoss, given: dict[str, Any], normaliser: float) -> Tensor:
    """The same in fp64 with autograd, [tokens x width] and all."""
    values = torch.zeros(len(given["logits_T"]), dtype=torch.float64)
    kept = given.get("kept")
    for student, teacher in zip(given["students_TD"], given["teachers_TE"], strict=True):
        u, v = student.double(), teacher.double()
        if kept is not None:
            v = v[:, kept] if kept.dim() == 1 else v @ kept.double()
        if given["projection_ED"] is not None:
            u = u @ given["projection_ED"].double().T
        if settings.distance == "cosine":
            values = values + 1 - torch.cosine_similarity(u, v, dim=-1)
        else:
            values = values + (u - v).square().mean(-1) / v.square().mean(-1)
    if settings.averaged:
        values = values / len(given["students_TD"])
    total = torch.zeros((), dtype=torch.float64)
    for sequence in range(given["sequences"]):
        mine = given["sequence_T"] == sequence
        if settings.weight is None:
            weight = given["logits_T"][mine].double().sum() / values[mine].sum().detach()
        else:
            weight = torch.tensor(settings.weight)
        total = total + settings.factor * weight * values[mine].sum()
    return total / normaliser


def leaves(given: dict[str, Any]) -> list[Tensor]:
    projection = given["projection_ED"]
    return [*given["students_TD"], *([] if projection is None else [projection])]


def assert_is_the_formula(settings: HiddenStateLoss, given: dict[str, Any]) -> None:
    """Value and gradients are those of `naive`, which holds everything at once in fp64."""
    wanted = naive(settings, given, 17.0)
    expected = torch.autograd.grad(wanted, leaves(given))
    term = hidden_state_loss(settings, **given, normaliser=17.0)
    torch.testing.assert_close(term.total.double(), wanted.detach(), rtol=1e-5, atol=1e-7)
    for got, gradient in zip(torch.autograd.grad(term.total, leaves(given)), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("weight", [None, 0.7])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_value_and_gradient_are_those_of_the_formula(
    distance: Any, weight: float | None, projected: bool, chunk: int
) -> None:
    settings = HiddenStateLoss(distance, weight, chunk)
    given = inputs(projected)
    assert_is_the_formula(settings, given)


KEPT = {"index": torch.tensor([7, 0, 3, 9, 4, 1]), "matrix": torch.linalg.qr(states(E, 40, E))[0][:, :D].contiguous()}


@pytest.mark.parametrize("kept", list(KEPT))
@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("weight", [None, 0.7])
def test_kept_coordinates_by_the_formula(kept: str, distance: Any, weight: float | None) -> None:
    """The teacher's states are reduced, and a mean over pairs has a weight that falls."""
    settings = HiddenStateLoss(distance, weight, 4, averaged=True, factor=0.25)
    given = inputs(projected=True) | {"projection_ED": None, "kept": KEPT[kept]}
    assert_is_the_formula(settings, given)


@pytest.mark.parametrize("kept", list(KEPT))
def test_its_gradient_is_the_slope_of_its_value(kept: str) -> None:
    """Central differences along a direction: no formula is trusted."""
    settings = HiddenStateLoss("mse", 0.3, 5, averaged=True)
    given = inputs(projected=True) | {"projection_ED": None, "kept": KEPT[kept]}

    def value(step: float) -> float:
        moved = [one.detach() + step * states(D, 50 + i) for i, one in enumerate(given["students_TD"])]
        return float(hidden_state_loss(settings, **given | {"students_TD": moved}, normaliser=1.0).total)

    term = hidden_state_loss(settings, **given, normaliser=1.0)
    gradients = torch.autograd.grad(term.total, leaves(given))
    slope = sum(float((gradient * states(D, 50 + i)).sum()) for i, gradient in enumerate(gradients))
    assert (value(1e-2) - value(-1e-2)) / 2e-2 == pytest.approx(slope, rel=1e-3)


def test_what_is_kept_of_equal_states_is_equal() -> None:
    given = inputs(projected=True) | {"projection_ED": None, "kept": KEPT["index"]}
    given["students_TD"] = [one[:, KEPT["index"]].requires_grad_() for one in given["teachers_TE"]]
    term = hidden_state_loss(HiddenStateLoss("mse", 0.3, averaged=True), **given, normaliser=1.0)
    assert float(term.total.detach()) == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(term.total, leaves(given)))


def test_a_dynamic_weight_makes_it_as_large_as_the_logit_loss() -> None:
    given = inputs(projected=True)
    term = hidden_state_loss(HiddenStateLoss(), **given, normaliser=3.0)
    torch.testing.assert_close(term.total.detach(), given["logits_T"].sum() / 3.0)


def test_sequences_may_be_computed_apart() -> None:
    """As micro batches and ranks do: the parts sum to the whole, each with the weight that it has there."""
    given = inputs(projected=True)
    whole = hidden_state_loss(HiddenStateLoss(), **given, normaliser=5.0)
    gradients = torch.autograd.grad(whole.total, leaves(given))
    total = torch.zeros(())
    for sequence in range(SEQUENCES):
        mine = given["sequence_T"] == sequence
        part = {
            **given,
            "students_TD": [student[mine] for student in given["students_TD"]],
            "teachers_TE": [teacher[mine] for teacher in given["teachers_TE"]],
            "logits_T": given["logits_T"][mine],
            "sequence_T": torch.zeros(int(mine.sum()), dtype=torch.long),
            "sequences": 1,
        }
        total = total + hidden_state_loss(HiddenStateLoss(), **part, normaliser=5.0).total
    for got, wanted in zip(torch.autograd.grad(total, leaves(given)), gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_no_valid_token_gives_zero_and_keeps_the_graph(distance: Any) -> None:
    student, projection = states(D, 1).requires_grad_(), states(D, 2, E).requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    term = hidden_state_loss(
        HiddenStateLoss(distance), [student[nothing]], [states(E, 3)[nothing]], projection,
        logits_T=torch.zeros(0), sequence_T=nothing, sequences=2, normaliser=1.0,
    )  # fmt: skip
    term.total.backward()
    assert term.total == 0 and term.distance == 0
    assert student.grad is not None and not student.grad.any()
    assert projection.grad is not None and not projection.grad.any()


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_equal_states_have_nothing_to_learn(distance: Any) -> None:
    given = inputs(projected=False) | {"teachers_TE": [states(D, pair) for pair in range(2)]}
    term = hidden_state_loss(HiddenStateLoss(distance), **given, normaliser=1.0)
    assert float(term.distance.detach()) < 1e-12
    for gradient in torch.autograd.grad(term.total, leaves(given)):
        assert gradient.isfinite().all()


def test_nearly_equal_directions_keep_their_digits() -> None:
    """1 - cos in fp32 would be 0 or a few times 6e-8 here."""
    teacher = states(D, 1)
    student = (teacher + 1e-4 * states(D, 2)).requires_grad_()
    given = inputs(projected=False, pairs=1) | {"students_TD": [student], "teachers_TE": [teacher]}
    term = hidden_state_loss(HiddenStateLoss(weight=1.0), **given, normaliser=1.0)
    wanted = naive(HiddenStateLoss(weight=1.0), given, 1.0).detach()
    torch.testing.assert_close(term.total.double(), wanted, rtol=2e-3, atol=0.0)


def test_a_state_of_zeros_gets_no_gradient() -> None:
    zeros = torch.zeros(2, D, requires_grad=True)
    given = {"logits_T": torch.ones(2), "sequence_T": torch.zeros(2, dtype=torch.long), "sequences": 1}
    term = hidden_state_loss(HiddenStateLoss(), [zeros], [states(D, 1, 2)], None, **given, normaliser=1.0)
    term.total.backward()
    assert zeros.grad is not None and not zeros.grad.any()


def test_the_gradient_can_be_taken_once() -> None:
    given = inputs(projected=True)
    term = hidden_state_loss(HiddenStateLoss(), **given, normaliser=1.0)
    (2 * term.total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        term.total.backward()


def test_what_multiplies_the_loss_multiplies_the_gradient() -> None:
    gradients = []
    for factor in (1.0, 3.0):
        given = inputs(projected=True)
        term = hidden_state_loss(HiddenStateLoss(), **given, normaliser=1.0)
        gradients.append(torch.autograd.grad(factor * term.total, leaves(given)))
    for once, thrice in zip(*gradients, strict=True):
        torch.testing.assert_close(3.0 * once, thrice)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_beside_the_gradient_nothing_grows_with_the_tokens(weight: float | None) -> None:
    """The projected states [tokens x teacher's width] never exist; a chunk of them does."""
    width, chunk = 64, 16
    for tokens in (200, 400):
        students, teachers = [states(D, 1, tokens).requires_grad_()], [states(width, 2, tokens)]
        given = {
            "projection_ED": states(D, 3, width), "logits_T": torch.ones(tokens), "sequences": 1,
            "sequence_T": torch.zeros(tokens, dtype=torch.long), "normaliser": 1.0,
        }  # fmt: skip
        with LargestTensor() as seen:
            hidden_state_loss(HiddenStateLoss("cosine", weight, chunk), students, teachers, **given)
        assert seen.elements <= max(tokens * D, chunk * width)
