"""The chunked loss is the loss of the papers: checked against fp64 autograd of the formula written down naively."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.runtime.loss import DistillationLoss, Head, LossTerms, distillation_loss, products, shared
from tests.runtime import naive

TOKENS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 37, 500, 12, 20
NORMALISER = 50.0


class Inputs:
    """Random hidden states and heads in fp64, and the same numbers as leaves in other dtypes."""

    def __init__(self, *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, tokens: int = TOKENS):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight = normal(tokens, HIDDEN), normal(VOCABULARY, HIDDEN)
        self.bias = normal(VOCABULARY) if bias else None
        self.teacher_hidden, self.teacher_weight = normal(tokens, TEACHER_HIDDEN), normal(VOCABULARY, TEACHER_HIDDEN)
        self.teacher_bias = normal(VOCABULARY) if bias else None
        self.labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
        self.scale, self.softcap = scale, softcap

    def run(self, function: Any, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The loss of `function(hidden, student, teacher hidden, teacher, labels)` and the gradients of the student."""
        leaves = [t.to(dtype).detach().clone().requires_grad_() for t in (self.hidden, self.weight)]
        bias = None if self.bias is None else self.bias.to(dtype).detach().clone().requires_grad_()
        student = Head(leaves[1], bias, self.scale, self.softcap)
        teacher_bias = None if self.teacher_bias is None else self.teacher_bias.to(dtype)
        # The teacher's head differs from the student's in everything.
        teacher = Head(self.teacher_weight.to(dtype), teacher_bias, 0.5, None if self.softcap is None else 7.0)
        loss = function(leaves[0], student, self.teacher_hidden.to(dtype), teacher, self.labels)
        loss.backward()
        gradients = [leaf.grad for leaf in [*leaves, *([] if bias is None else [bias])]]
        assert all(gradient is not None for gradient in gradients)
        return loss.detach(), [gradient for gradient in gradients if gradient is not None]

    def exact(self, settings: DistillationLoss) -> tuple[Tensor, list[Tensor]]:
        return self.run(lambda *given: naive.loss(settings, *given, normaliser=NORMALISER), torch.float64)

    def chunked(self, settings: DistillationLoss, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
        return self.run(lambda *given: terms(settings, *given).total, dtype)


def terms(
    settings: DistillationLoss, hidden: Tensor, student: Head, *rest: Any, normaliser: float = NORMALISER, **more: Any
) -> LossTerms:
    return distillation_loss(settings, hidden, student, *rest, normaliser=normaliser, **more)


@pytest.mark.parametrize("kept", [0, 16, TOKENS])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_logits_that_students_share_change_no_bit(monkeypatch: pytest.MonkeyPatch, divergence: Any, kept: int) -> None:
    """All of them, some, or none; they are not changed by one student for the next."""
    inputs, settings = Inputs(bias=True, softcap=5.0), DistillationLoss(divergence, 2.0, chunk_tokens=8)
    monkeypatch.setattr(shared, "SHARED_BYTES", {"cpu": 4 * VOCABULARY * (kept + 3)})
    found = []

    def sharing(hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, labels: Tensor) -> Tensor:
        logits = shared.shared_logits(teacher_hidden, teacher, settings.chunk_tokens)
        before = logits.clone()
        found.append(logits.shape[0])
        total = terms(settings, hidden, student, teacher_hidden, teacher, labels, teacher_SV=logits).total
        assert torch.equal(logits, before)
        return total

    for one, other in zip(inputs.run(sharing, torch.float32), inputs.chunked(settings), strict=True):
        assert all(map(torch.equal, *(([each] if isinstance(each, Tensor) else each) for each in (one, other))))
    assert found == [kept]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error, in norm, of the gradients."""
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_value_and_gradient_are_those_of_the_formula(divergence: Any) -> None:
    combinations = itertools.product([None, 5.0], [1.0, 0.7], [1.0, 2.5], [False, True], [0.0, 0.3], [1.0, 0.5])
    for softcap, scale, temperature, bias, cross_entropy, weight in combinations:
        settings = DistillationLoss(divergence, temperature, weight, cross_entropy, chunk_tokens=8)
        inputs = Inputs(bias=bias, scale=scale, softcap=softcap)
        (want_loss, want), (loss, got) = inputs.exact(settings), inputs.chunked(settings)
        assert error(got, want) <= 1e-5, settings
        assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)


def test_cross_entropy_alone_needs_no_teacher() -> None:
    settings, inputs = DistillationLoss(weight=0.0, cross_entropy=1.0), Inputs()
    _, want = inputs.exact(settings)
    _, got = inputs.run(
        lambda h, student, _t, _head, labels: terms(settings, h, student, None, None, labels).total, torch.float32
    )
    assert error(got, want) <= 1e-5


def test_the_divergence_alone_needs_no_labels() -> None:
    settings, inputs = DistillationLoss(), Inputs()
    _, want = inputs.exact(settings)
    _, got = inputs.run(lambda h, student, t, head, _: terms(settings, h, student, t, head, None).total, torch.float32)
    assert error(got, want) <= 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(divergence: Any) -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(64, 8)
    result = terms(DistillationLoss(divergence), hidden, Head(weight), hidden.detach(), Head(weight.clone()), None)
    result.total.backward()
    assert hidden.grad is not None
    assert abs(float(result.total.detach())) < 1e-7 and float(hidden.grad.abs().max()) < 1e-7


def test_jsd_is_symmetric_and_at_most_log_2() -> None:
    one, other = torch.randn(9, 8) * 9, torch.randn(9, 8) * 9
    head, jsd = Head(torch.randn(64, 8)), DistillationLoss("jsd")
    there = terms(jsd, one, head, other, head, None, normaliser=9).total
    back = terms(jsd, other, head, one, head, None, normaliser=9).total
    assert float(there) == pytest.approx(float(back), rel=1e-6)
    assert 0.1 < float(there) <= 0.6931472


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_distributions_without_overlap_stay_finite(divergence: Any) -> None:
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    head = Head(torch.eye(2) * 500.0)
    result = terms(DistillationLoss(divergence), hidden, head, torch.tensor([[0.0, 1.0]]), head, None)
    result.total.backward()
    assert hidden.grad is not None
    assert torch.isfinite(result.total) and torch.isfinite(hidden.grad).all()


def test_tied_embeddings_get_both_gradients() -> None:
    settings, inputs = DistillationLoss(cross_entropy=0.2), Inputs(tokens=20)
    ids = torch.arange(20) * 7 % VOCABULARY

    def gradient(function: Any, dtype: torch.dtype) -> Tensor:
        table = inputs.weight.to(dtype).clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(ids, table))
        teacher = Head(inputs.teacher_weight.to(dtype))
        function(hidden, Head(table), inputs.teacher_hidden.to(dtype), teacher, inputs.labels).backward()
        assert table.grad is not None
        return table.grad

    want = gradient(lambda *given: naive.loss(settings, *given, normaliser=NORMALISER), torch.float64)
    got = gradient(lambda *given: terms(settings, *given).total, torch.float32)
    assert error([got], [want]) <= 1e-5


def test_a_batch_without_valid_tokens_keeps_the_graph_and_gives_zero() -> None:
    inputs = Inputs(tokens=5)
    hidden, weight = inputs.hidden.float().requires_grad_(), inputs.weight.float().requires_grad_()
    none = torch.zeros(5, dtype=torch.bool)
    result = terms(
        DistillationLoss(cross_entropy=0.5),
        hidden[none],
        Head(weight),
        inputs.teacher_hidden.float()[none],
        Head(inputs.teacher_weight.float()),
        inputs.labels[none],
        normaliser=1.0,
    )
    result.total.backward()
    assert float(result.total.detach()) == 0.0
    assert hidden.grad is not None and weight.grad is not None
    assert float(hidden.grad.abs().max()) == 0.0 and float(weight.grad.abs().max()) == 0.0


def test_chunks_of_any_size_give_the_same() -> None:
    inputs = Inputs(softcap=5.0)
    settings = DistillationLoss("reverse_kl", 2.0, 1.0, 0.5)
    results = [inputs.chunked(replace(settings, chunk_tokens=size)) for size in (1, 7, 37, 1024)]
    for loss, gradients in results[1:]:
        assert float(loss) == pytest.approx(float(results[0][0]), rel=1e-6)
        assert error(gradients, [g.double() for g in results[0][1]]) < 1e-6


def test_parts_of_a_batch_sum_to_the_whole() -> None:
    """Micro batches and ranks: each divides by the global count, so nothing but a sum is left to do."""
    inputs, settings = Inputs(), DistillationLoss(cross_entropy=0.5)
    whole, _ = inputs.chunked(settings)
    head, teacher = Head(inputs.weight.float()), Head(inputs.teacher_weight.float(), None, 0.5)
    parts = [
        terms(
            settings, inputs.hidden[p].float(), head, inputs.teacher_hidden[p].float(), teacher, inputs.labels[p]
        ).total
        for p in (slice(0, 11), slice(11, 37))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_what_multiplies_the_loss_multiplies_the_gradient() -> None:
    inputs, settings = Inputs(), DistillationLoss()
    _, once = inputs.chunked(settings)
    _, thrice = inputs.run(lambda *given: terms(settings, *given).total * 3.0, torch.float32)
    assert error(thrice, [3.0 * gradient.double() for gradient in once]) < 1e-6


def test_the_gradient_can_be_taken_once() -> None:
    hidden, head = torch.randn(3, 4, requires_grad=True), Head(torch.randn(8, 4))
    loss = terms(DistillationLoss(), hidden, head, torch.randn(3, 4), head, None).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_terms_are_reported_without_their_weights() -> None:
    inputs = Inputs()
    hidden, student = inputs.hidden, Head(inputs.weight)
    teacher = Head(inputs.teacher_weight)
    rest = (inputs.teacher_hidden.float(), teacher.in_dtype(torch.float32), inputs.labels)
    result = terms(
        DistillationLoss(temperature=2.0, weight=0.5, cross_entropy=0.1),
        hidden.float(),
        student.in_dtype(torch.float32),
        *rest,
    )
    s, t = naive.logits(hidden, student), naive.logits(inputs.teacher_hidden, teacher)
    assert float(result.divergence) == pytest.approx(
        float(naive.divergence("forward_kl", s / 2, t / 2).sum()) / NORMALISER
    )
    nll = -s.log_softmax(-1).gather(-1, inputs.labels[:, None]).sum()
    assert float(result.cross_entropy) == pytest.approx(float(nll) / NORMALISER)
    assert float(result.total) == pytest.approx(0.5 * 4 * float(result.divergence) + 0.1 * float(result.cross_entropy))


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation yields."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_no_tensor_of_tokens_times_vocabulary_ever_exists(divergence: Any) -> None:
    inputs, chunk = Inputs(tokens=400), 16
    settings = DistillationLoss(divergence, 2.0, 1.0, 0.5, chunk_tokens=chunk)
    with LargestTensor() as seen:
        inputs.chunked(settings)
    assert chunk * VOCABULARY <= seen.elements < 2 * chunk * VOCABULARY


def test_bf16_inputs_lose_nothing_but_their_own_rounding() -> None:
    """Near convergence the log-softmax of bf16 logits is far off; products and softmax in fp32 are not."""
    inputs = Inputs()
    inputs.teacher_hidden, inputs.teacher_weight = inputs.hidden, inputs.weight  # rounded to the same bf16 numbers
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(inputs, name, getattr(inputs, name).bfloat16().double())
    inputs.hidden = (inputs.hidden + 0.02 * torch.randn(inputs.hidden.shape).double()).bfloat16().double()

    def ours(hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, _: Tensor) -> Tensor:
        return terms(DistillationLoss(), hidden, student, teacher_hidden, replace(teacher, scale=1.0), None).total

    def formula(hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, labels: Tensor) -> Tensor:
        settings = DistillationLoss()
        return naive.loss(settings, hidden, student, teacher_hidden, replace(teacher, scale=1.0), labels, NORMALISER)

    loss, want = inputs.run(formula, torch.float64)
    assert 1e-4 < float(loss) * NORMALISER / TOKENS < 0.02, "this test is about small divergences"
    ours_error, naive_error = (error(inputs.run(f, torch.bfloat16)[1], want) for f in (ours, formula))
    assert ours_error < 0.004  # half a unit in the last place of the bf16 that the gradients are returned in
    assert naive_error > 10 * ours_error


def test_autocast_around_it_changes_nothing() -> None:
    inputs, settings = Inputs(), DistillationLoss()
    _, want = inputs.chunked(settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, got = inputs.chunked(settings)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def emulate_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that CUDA takes for bf16 heads, with its products emulated: bf16 inputs and fp32 results."""

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        assert left.dtype == right.dtype and (out_dtype is None or left.dtype == torch.bfloat16)
        result = torch.matmul(left.float(), right.float())
        return result if out is None else out.copy_(result)

    def addmm(onto: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16 and onto.dtype == out_dtype == torch.float32
        return out.copy_(onto + torch.matmul(left.float(), right.float()))

    monkeypatch.setattr(products, "on_tensor_cores", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)


def rounded(inputs: Inputs) -> Inputs:
    """The same numbers as bf16 has them."""
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        if (value := getattr(inputs, name)) is not None:
            setattr(inputs, name, value.bfloat16().double())
    return inputs


def test_the_products_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_tensor_cores(monkeypatch)
    inputs, settings = rounded(Inputs(bias=True)), DistillationLoss(cross_entropy=0.5)
    _, want = inputs.exact(settings)
    _, got = inputs.chunked(settings, torch.bfloat16)
    assert error(got, want) < 0.005


def test_torch_has_the_products_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path with torch's own products, on tensors without data: operands, their dtypes and where results go are
    checked as on CUDA."""
    monkeypatch.setattr(products, "on_tensor_cores", lambda weight: weight.dtype == torch.bfloat16)
    bf16: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    hidden, weight = torch.empty(6, 8, **bf16), torch.empty(150, 8, **bf16)
    logits, outer = torch.empty(6, 150, device="meta"), torch.empty(150, 8, device="meta")
    with OutDtypes() as seen:
        products.project(hidden.float(), weight, logits)
        factor = products.as_factor(logits, weight)
        assert factor.dtype == torch.bfloat16
        products.project_back(factor, weight, torch.empty(6, 8, device="meta"))
        products.project_back(factor, weight, hidden)
        products.accumulate_outer(factor, hidden, weight, outer)
    assert seen.formats == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 4


class OutDtypes(TorchDispatchMode):
    """The dtypes of all products: left, right, result."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            *_, left, right = (one for one in args if isinstance(one, Tensor))
            self.formats.append((left.dtype, right.dtype, result.dtype))
        return result


def test_the_heads_gradient_is_added_to_a_sum_without_a_tensor_of_its_own() -> None:
    inputs, settings = Inputs(), DistillationLoss(cross_entropy=0.5)
    _, (want_hidden, want_weight) = inputs.chunked(settings)
    hidden, weight = inputs.hidden.float().requires_grad_(), inputs.weight.float().requires_grad_()
    before = torch.randn_like(weight)
    weight.grad = before.clone()
    teacher = Head(inputs.teacher_weight.float(), None, 0.5)
    given = (hidden, Head(weight), inputs.teacher_hidden.float(), teacher, inputs.labels)
    with LargestTensor() as seen:
        result = distillation_loss(settings, *given, normaliser=NORMALISER, head_gradient_VD=weight.grad)
        (result.total + 0.0 * hidden.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert error([hidden.grad, weight.grad - before], [want_hidden.double(), want_weight.double()]) < 1e-5
    assert seen.elements == TOKENS * VOCABULARY  # a chunk of logits

    result = distillation_loss(settings, *given, normaliser=NORMALISER, head_gradient_VD=weight.grad)
    with pytest.raises(RuntimeError, match="nothing may multiply the loss"):
        (result.total * 2).backward()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_tokens_count_nothing_whatever_their_rows_hold(divergence: Any, softcap: float | None) -> None:
    inputs = Inputs(softcap=softcap)
    settings = DistillationLoss(divergence, 2.0, 1.0, 0.5, chunk_tokens=8)
    valid = torch.arange(TOKENS) % 3 != 1
    picked = Inputs(softcap=softcap)
    for name in ("hidden", "teacher_hidden", "labels"):
        setattr(picked, name, getattr(inputs, name)[valid])
    inputs.hidden[~valid], inputs.teacher_hidden[~valid] = torch.inf, torch.nan
    loss, (hidden, weight) = inputs.run(lambda *given: terms(settings, *given, valid_T=valid).total, torch.float32)
    want_loss, (want_hidden, want_weight) = picked.chunked(settings)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    assert bool((hidden[~valid] == 0).all())
    assert error([hidden[valid], weight], [want_hidden.double(), want_weight.double()]) < 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_token_that_is_impossible_to_both_models_sets_them_not_apart(divergence: Any) -> None:
    """A bias of -inf: padding of a vocabulary, masked by the model."""
    inputs, settings = Inputs(bias=True), DistillationLoss(divergence)
    assert inputs.bias is not None and inputs.teacher_bias is not None
    inputs.bias[-9:], inputs.teacher_bias[-9:] = -torch.inf, -torch.inf
    loss, (hidden, weight, _) = inputs.chunked(settings)
    kept = Inputs(bias=True)
    kept.labels = torch.zeros_like(kept.labels)  # not used by these losses
    for name in ("weight", "bias", "teacher_weight", "teacher_bias"):
        setattr(kept, name, getattr(inputs, name)[:-9])
    want_loss, (want_hidden, want_weight, _) = kept.exact(settings)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    assert error([hidden, weight[:-9]], [want_hidden, want_weight]) < 1e-5 and bool((weight[-9:] == 0).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.005)])
def test_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    inputs, settings = Inputs(bias=True, softcap=5.0), DistillationLoss(cross_entropy=0.5)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            value = value.to(dtype).double() if value.is_floating_point() else value
            setattr(inputs, name, value.cuda())
    _, want = inputs.exact(settings)
    _, got = inputs.run(
        lambda h, student, t, teacher, labels: (
            distillation_loss(
                settings, h, student, t, teacher, labels, normaliser=NORMALISER, compute_dtype=dtype
            ).total
        ),
        dtype,
    )
    assert error(got, want) < tolerance
