"""Scores of values without a batch dimension: each sample counts for itself, whatever batch it comes in."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.compiler import Plan
from minitron.compiler.importance.sample_rows import SampleRows
from minitron.compiler.importance.scores import Aggregation, WidthConfig
from minitron.compiler.roles.names import HEADS, MOE_INTERMEDIATE, NUM_EXPERTS, SHARED
from minitron.specs.errors import SpecInvalid
from tests.compiler.test_calibrate import SAMPLES, aggregate, flat, scores
from tests.foundry import Foundry, logits, teacher_model
from tests.models import MIXTURES, save_teacher
from tests.runtime.listening import Messages
from tests.zoo.configs import config_of

FFN = "intermediate_size"
MIXED = [*MIXTURES, "mixtral"]
HOW: list[tuple[Aggregation, Aggregation]] = [("l2", "mean"), ("var", "mean"), ("mean", "l2"), ("mean", "var")]


class Hooks:
    """What the experts of transformers' own modules yield, a sample at a time: layer -> [samples, rows, experts, channels].

    A row is a token and one of its experts, at 0 for all others; where every expert is given every token, it is a token.
    """

    def __init__(self, plan: Plan) -> None:
        self.routed: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.plain: dict[str, list[torch.Tensor]] = defaultdict(list)
        model = teacher_model(plan)
        for name, module in model.named_modules():
            layer = plan.teacher.captured.layer_in_path(name)
            if layer is None:
                continue
            if hasattr(module, "gate_up_proj") and getattr(module.gate_up_proj, "ndim", 0) == 3:
                module.register_forward_pre_hook(self._experts(layer), with_kwargs=True)
            elif name.endswith(("down_proj", "o_proj", "c_proj", "out_proj", "fc2")):
                module.register_forward_pre_hook(self._input(name))
        for sample in SAMPLES:
            logits(model, sample[None])

    def _input(self, name: str) -> Any:
        return lambda module, args: self.plain[name].append(args[0].reshape(1, -1, args[0].shape[-1]).double())

    def _experts(self, layer: int) -> Any:
        def enter(module: Any, args: Any, kwargs: Any) -> None:
            hidden, *routing = (*args, *kwargs.values())
            count, width = module.num_experts, module.down_proj[0].numel() // hidden.shape[-1]
            if not routing:  # [experts * tokens, hidden], scaled by the router beforehand
                gate_up = torch.bmm(hidden.view(count, -1, hidden.shape[-1]), module.gate_up_proj)
                rows = neurons(module, gate_up).transpose(0, 1)
            else:
                index = routing[0]
                rows = torch.zeros(*index.shape, count, width)
                for token, chosen in enumerate(index):
                    for place, expert in enumerate(chosen):
                        rows[token, place, expert] = neurons(module, projected(module, int(expert), hidden[token]))
                rows = rows.flatten(0, 1)
            self.routed[layer].append(rows[None].double())

        return enter

    def of_experts(self, layer: int) -> torch.Tensor:
        return torch.cat(self.routed[layer])

    def of(self, name: str) -> torch.Tensor:
        return torch.cat(self.plain[name])


def projected(module: Any, expert: int, row: torch.Tensor) -> torch.Tensor:
    weight = module.gate_up_proj[expert]
    if module.is_transposed:
        weight = weight.T
    result: torch.Tensor = weight @ row
    return result + module.gate_up_proj_bias[expert] if module.has_bias else result


def neurons(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    if type(module).__name__ == "GptOssExperts":
        gate, up = gate_up[..., ::2].clamp(max=module.limit), gate_up[..., 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = gate_up.chunk(2, -1)
    result: torch.Tensor = module.act_fn(gate) * up
    return result


@pytest.fixture(scope="module")
def hooked(foundry: Foundry) -> dict[str, tuple[Plan, Hooks]]:
    plans = {family: foundry.whole(family, num_hidden_layers=2) for family in MIXED}
    return {family: (plan, Hooks(plan)) for family, plan in plans.items()}


def close(got: Any, wanted: torch.Tensor) -> None:
    """1e-5, of the largest where a variance leaves less."""
    got = torch.as_tensor(got).double()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize(("batch", "sequence"), HOW)
def test_experts_channels_are_scored_sample_by_sample(
    hooked: dict[str, tuple[Plan, Hooks]], family: str, batch: Aggregation, sequence: Aggregation
) -> None:
    plan, hooks = hooked[family]
    got = scores(plan, width=WidthConfig(batch, sequence))
    routed = next(name for name in (MOE_INTERMEDIATE, FFN) if name in got.widths)
    assert hooks.routed
    for layer in hooks.routed:
        values = hooks.of_experts(layer)
        wanted = aggregate(values.flatten(2), sequence, batch).reshape(values.shape[2:])
        assert float(wanted.std()) > 0
        close(got.widths[routed][layer], wanted)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama4_text"])
def test_so_are_shared_experts(hooked: dict[str, tuple[Plan, Hooks]], family: str) -> None:
    plan, hooks = hooked[family]
    got = scores(plan, width=WidthConfig("var", "mean")).widths[SHARED]
    for layer, score in got.items():
        (name,) = (name for name in hooks.plain if f".{layer}." in name and "shared" in name)
        close(score, aggregate(hooks.of(name), "mean", "var"))


@pytest.mark.parametrize(
    ("family", "neurons", "heads"),
    [("gpt2", "mlp.c_proj", "attn.c_proj"), ("gpt_bigcode", "mlp.c_proj", "attn.c_proj"), ("opt", "fc2", "out_proj")],
)
def test_projections_of_flattened_tokens(foundry: Foundry, family: str, neurons: str, heads: str) -> None:
    """Some dense models too take the tokens of all samples together before they project them."""
    teacher = save_teacher(foundry.root / f"{family}-rows", config_of(family))
    plan = foundry.plan(teacher, {"num_hidden_layers": config_of(family).num_hidden_layers})
    hooks, got = Hooks(plan), scores(plan, width=WidthConfig("var", "mean"))
    for layer, score in got.widths[FFN].items():
        (name,) = (name for name in hooks.plain if f".{layer}." in name and name.endswith(neurons))
        close(score, aggregate(hooks.of(name), "mean", "var"))
        (name,) = (name for name in hooks.plain if f".{layer}." in name and name.endswith(heads))
        site = plan.teacher.roles.heads[layer]
        channels = aggregate(hooks.of(name), "mean", "var").reshape(site.groups, site.repeats, -1)
        close(got.heads[layer], channels.norm(dim=-1))


@pytest.mark.parametrize("family", MIXED)
def test_samples_that_cannot_be_told_apart_are_run_alone(
    hooked: dict[str, tuple[Plan, Hooks]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = hooked[family]
    together = flat(scores(plan))
    monkeypatch.setattr(SampleRows, "find", lambda self, node: None)
    alone = flat(scores(plan))
    assert alone.keys() == together.keys()
    for name, value in together.items():
        close(alone[name], torch.from_numpy(value).double())


# -- scores that rank nothing -----------------------------------------------------------------------------------------


def refusal(foundry: Foundry, teacher: Any, student: dict[str, Any], **importance: Any) -> str:
    blocks = {"importance": {"data": foundry.calibration | importance.pop("data", {})} | importance}
    with pytest.raises(SpecInvalid) as caught:
        foundry.build(teacher, student, program=False, **blocks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("axis", "where"), [(FFN, f"{FFN} in layer 0"), (HEADS, f"{HEADS} in layer 0"), ("hidden_size", "hidden_size")]
)
def test_a_variance_over_one_sample_ranks_nothing(foundry: Foundry, axis: str, where: str) -> None:
    words = refusal(foundry, foundry.teacher("llama"), {axis: "50%"}, data={"samples": 1}, width={"batch": "var"})
    assert f"importance.width: the scores of {where} are all 0, so they rank nothing" in words
    assert "a variance over equal values, or over one alone, is 0; write batch: l2, or give more data" in words


def test_activations_that_are_all_alike_rank_nothing(foundry: Foundry) -> None:
    teacher = foundry.root / "silent"
    if not teacher.exists():
        whole = foundry.teacher("llama")
        teacher.mkdir()
        for file in whole.iterdir():
            (teacher / file.name).write_bytes(file.read_bytes())
        tensors = load_file(teacher / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"].zero_()
        save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    words = refusal(foundry, teacher, {FFN: 24})
    assert f"importance.width: the scores of {FFN} in layer 1 are all 0, so they rank nothing" in words
    assert "give other data (importance.data), on which its activations differ, or leave the axis out" in words


def test_experts_that_no_token_is_sent_to_are_told(foundry: Foundry, tmp_path: Any) -> None:
    teacher = foundry.teacher("qwen3_moe", num_experts=32, num_experts_per_tok=1, num_hidden_layers=1)
    said = Messages()
    blocks = {"importance": {"data": foundry.calibration | {"samples": 1, "sequence_length": 8}}}
    loaded = foundry.load(teacher, {MOE_INTERMEDIATE: 16}, **blocks)
    foundry.compile(loaded, tmp_path / "build", said, program=False)
    (message,) = [one for one in said.texts if "no calibration token" in one]
    assert f"{MOE_INTERMEDIATE} in layer 0: no calibration token is sent to" in message
    loaded = foundry.load(teacher, {NUM_EXPERTS: 2}, **blocks)
    foundry.compile(loaded, tmp_path / "fewer", said := Messages(), program=False)
    assert not any("no calibration token" in one for one in said.texts), "experts themselves are ranked"
