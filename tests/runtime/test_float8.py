"""Products in float8, emulated on the CPU by the library that computes them on a GPU: the path is the one of a GPU, up to the
kernel itself."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from minitron.runtime import evaluate, float8, record, setup, train
from minitron.runtime.float8 import Float8Weight, compute_student_in_float8, hold_teacher_in_float8
from minitron.runtime.models import LanguageModel
from minitron.runtime.sharding import decoder_layers
from minitron.specs.errors import MinitronError, Refused, SpecInvalid
from minitron.specs.progress import Silent
from minitron.specs.training_plan import HeadPlan, TrainingPlan, deciding_settings
from tests.models import tiny_config
from tests.runtime import tiny
from tests.runtime.processes import kill_at_seventh_step, train_in_process, train_on_ranks
from tests.runtime.test_training import losses, run, weights

pytest.importorskip("torchao")

CPU = torch.device("cpu")
HEAD = HeadPlan(backbone="model", module="lm_head", weight="lm_head.weight", bias=None, scale=1.0, softcap=None)
BOTH = {"compute_dtype__cpu": "float8", "teacher__compute": "float8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of models whose sizes float8 can have."""
    return tiny.make_build(tmp_path_factory.mktemp("float8"), tiny.llama(32), tiny.llama(16))


@pytest.fixture
def build(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made.parent, tmp_path / "here")
    return tmp_path / "here" / made.name


def plan(**changes: Any) -> TrainingPlan:
    return TrainingPlan.model_validate(tiny.plan(**changes))


def model(config: Any = None) -> LanguageModel:
    """A model whose weights have rows of different sizes, as real ones do."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config or tiny.llama(32)).eval()
    for layer in module.model.layers:
        for linear in (one for one in layer.modules() if isinstance(one, nn.Linear)):
            linear.weight.data.mul_(torch.logspace(-1, 0, linear.out_features)[:, None])
    return LanguageModel(module, HEAD, "model.layers")


def kinds(one: LanguageModel) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in one.module.named_modules()
        if isinstance(module, nn.Linear | Float8Weight)
    }


class TestWhichLayers:
    def test_linear_layers_of_decoder_layers_and_no_others(self) -> None:
        student, teacher = model(), model()
        before = dict(student.module.named_parameters())
        compute_student_in_float8(student, CPU, plan())
        hold_teacher_in_float8(teacher, CPU, CPU)
        for one, kind in ((student, "Float8Linear"), (teacher, "Float8Weight")):
            found = kinds(one)
            assert found.pop("lm_head") == "Linear"
            assert set(found.values()) == {kind} and len(found) == 2 * 7
        # What is trained, saved and loaded keeps its names, and is the same tensors.
        assert {name: id(p) for name, p in student.module.named_parameters()} == {n: id(p) for n, p in before.items()}

    def test_sizes_that_are_no_multiples_of_sixteen_stay(self) -> None:
        one = model(tiny.llama(32, intermediate_size=40))
        compute_student_in_float8(one, CPU, plan())
        found = kinds(one)
        assert {name.split(".")[-1] for name, kind in found.items() if kind == "Linear"} == {
            "lm_head", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip

    def test_none_at_all_is_refused(self) -> None:
        one = model(tiny.llama(24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=3, head_dim=8))
        message = "compute_dtype.cpu: no linear layer inside of a decoder layer has sizes that are multiples of 16"
        with pytest.raises(Refused) as error:
            compute_student_in_float8(one, CPU, plan())
        assert message in str(error.value)
        with pytest.raises(Refused, match=r"teacher\.compute: no linear layer"):
            hold_teacher_in_float8(one, CPU, CPU)

    def test_routers_and_experts_stay(self) -> None:
        """A router as a plain linear layer, of as many rows as a kernel could read, and experts in a list."""
        one = model(tiny_config("mixtral", hidden_size=32, intermediate_size=32, num_local_experts=16, vocab_size=64))
        for layer in decoder_layers(one):
            layer.router = nn.Linear(32, 16)  # type: ignore[assignment]
            layer.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))  # type: ignore[assignment]
        compute_student_in_float8(one, CPU, plan())
        changed = {name.rsplit(".", 1)[-1] for name, kind in kinds(one).items() if kind != "Linear"}
        assert changed == {"q_proj", "o_proj"}  # keys and values have 8 rows


class TestProducts:
    def test_forward_and_backward_are_off_by_the_rounding(self) -> None:
        """e4m3 has steps of an eighth: one of 32 in a value, and less in a sum of many."""
        exact, rounded = model(), model()
        compute_student_in_float8(rounded, CPU, plan())
        ids = torch.arange(64).reshape(2, 32)
        found = []
        for one in (exact, rounded):
            states = one.hidden_states(ids)
            states.square().sum().backward()  # type: ignore[no-untyped-call]
            found.append((states.detach(), {name: p.grad for name, p in one.module.named_parameters()}))
        (states, gradients), (near, nearly) = found
        assert 0 < (near - states).norm() / states.norm() < 0.1
        for name, gradient in gradients.items():
            if gradient is not None and "layers" in name:
                off = nearly[name]
                assert off is not None and off.dtype == torch.float32
                assert (off - gradient).norm() < 0.25 * gradient.norm(), name

    def test_teacher_and_student_round_alike(self) -> None:
        """A student of the teacher's weights, in float8 as the teacher is, has a divergence of 0 from it."""
        student, teacher = model(), model()
        compute_student_in_float8(student, CPU, plan())
        hold_teacher_in_float8(teacher, CPU, CPU)
        ids = torch.arange(64).reshape(2, 32)
        with torch.no_grad():
            assert torch.equal(student.hidden_states(ids), teacher.hidden_states(ids))

    def test_a_row_of_large_weights_leaves_the_others_alone(self) -> None:
        """A scale for each row: with one for the matrix the small rows would be rounded to nothing."""
        torch.manual_seed(0)
        linear = nn.Linear(64, 32, bias=True)
        linear.weight.data.mul_(torch.logspace(-5, 5, 32)[:, None])
        values = torch.randn(3, 5, 64)
        found = Float8Weight(linear, float8._config(CPU), CPU)(values) - linear.bias
        expected = linear(values) - linear.bias
        of_row = (found - expected).flatten(0, 1).norm(dim=0) / expected.flatten(0, 1).norm(dim=0)
        assert of_row.max() < 0.1

    def test_the_teacher_takes_a_byte_a_weight(self) -> None:
        one = model()
        hold_teacher_in_float8(one, CPU, CPU)
        for module in (module for module in one.module.modules() if isinstance(module, Float8Weight)):
            assert module.float8_weight.element_size() == 1 and module.float8_weight.is_contiguous()
            assert module.float8_scale.shape == (module.out_features, 1)
        assert not any(parameter.requires_grad for layer in decoder_layers(one) for parameter in layer.parameters()
                       if parameter.dtype == torch.float8_e4m3fn)  # fmt: skip

    def test_compiled_the_numbers_stay(self) -> None:
        """Traced forward and backward, run as they are: C++ would take a minute to compile."""
        ids = torch.arange(64).reshape(2, 32)
        for make in (
            lambda one: compute_student_in_float8(one, CPU, plan()),
            lambda one: hold_teacher_in_float8(one, CPU, CPU),
        ):
            plain, compiled = model(), model()
            for one in (plain, compiled):
                make(one)
            for layer in decoder_layers(compiled):
                layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
            with torch.no_grad():
                assert torch.allclose(plain.hidden_states(ids), compiled.hidden_states(ids), rtol=1e-5, atol=1e-6)


class TestTraining:
    def test_it_learns_nearly_as_in_fp32(self, build: Path, tmp_path: Path) -> None:
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        exact = losses(build, tokens=64 * 20)
        rounded = losses(tmp_path / "there" / "build", tokens=64 * 20, **BOTH)
        assert exact != rounded and exact == pytest.approx(rounded, rel=0.02)
        # What is saved is the weights, in their own names and dtype.
        one, other = weights(build), weights(tmp_path / "there" / "build")
        assert one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)

    def test_recomputation_changes_nothing(self, build: Path, tmp_path: Path) -> None:
        found = []
        for number, what in enumerate((False, "attention", True)):
            shutil.copytree(tmp_path / "here", tmp_path / str(number))
            found.append(losses(tmp_path / str(number) / "build", tokens=64 * 4, gradient_checkpointing=what, **BOTH))
        assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] == pytest.approx(found[2], rel=1e-6)

    def test_bf16_weights_and_moments_of_eight_bits(self, build: Path) -> None:
        lines = run(build, tokens=64 * 20, weights="bfloat16", optimizer__states="int8", **BOTH)
        assert lines[-1]["loss"] < lines[0]["loss"]

    def test_a_length_that_is_no_multiple_of_sixteen(self, build: Path) -> None:
        """The gradient of a weight sums over the tokens of a micro batch: kernels read them by sixteen."""
        lines = run(build, sequence_length=12, tokens=48 * 8, held_out=None, checkpoint__every_tokens=10**6, **BOTH)
        assert lines[-1]["loss"] < lines[0]["loss"]

    def test_killed_and_resumed_it_is_the_same(self, build: Path, tmp_path: Path) -> None:
        tiny.write_plan(build, **BOTH)
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        assert train_in_process(build) == "done"
        assert train_in_process(tmp_path / "there" / "build", kill_at_seventh_step) is None
        assert train_in_process(tmp_path / "there" / "build") == "done"
        one, other = (
            load_file(at / "build" / "model" / "model.safetensors") for at in (build.parent, tmp_path / "there")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize("teacher", ["sharded", "replicated"])
    def test_on_two_ranks(self, build: Path, tmp_path: Path, teacher: str) -> None:
        """Weights of student and teacher spread by rows, a scale of the teacher's with its row."""
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        alone = losses(build, tokens=64 * 6, **BOTH)
        there = tmp_path / "there" / "build"
        layout = {"student": "sharded", "teacher": teacher, "cpu_offload": False}
        tiny.write_plan(there, tokens=64 * 6, layout=layout, gradient_checkpointing=True, **BOTH)
        assert train_on_ranks(there, 2) == ["done"] * 2
        found = [line["loss"] for line in tiny.read_metrics(there / "train" / "metrics.jsonl")]
        assert found == pytest.approx(alone, rel=2e-3)

    def test_a_teacher_is_corrected_in_float8_and_saved_as_it_is(self, build: Path) -> None:
        correction = {
            "tokens": 64 * 4, "optimizer": {"lr": 1e-3, "warmup_steps": 1}, "every_tokens": 10**6, "output": "teacher",
            "work": "train/teacher",
        }  # fmt: skip
        lines = run(build, tokens=64 * 8, teacher_correction=correction, **BOTH)
        assert lines[-1]["loss"] < lines[0]["loss"]
        before, after = (load_file(at / "teacher" / "model.safetensors") for at in (build.parent, build))
        assert before.keys() == after.keys() and all(after[name].dtype == before[name].dtype for name in before)
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])

    def test_samples_are_drawn_from_the_teacher_in_float8(self, build: Path) -> None:
        """Drawn again where the teacher computes otherwise, trained from without a teacher."""
        sampled = {"teacher_logits": {"sampled": 12}, "tokens": 64 * 4}
        tiny.write_plan(build, **sampled, **BOTH)
        assert record(build, device="cpu", progress=Silent())["samples"] == 16
        train(build, device="cpu", progress=Silent())
        shutil.rmtree(build / "train")
        tiny.write_plan(build, **sampled)
        with pytest.raises(MinitronError, match=r"drawn with other settings \(teacher.compute\)"):
            train(build, device="cpu", progress=Silent())

    def test_the_evaluation_is_of_the_teacher_as_it_is(self, build: Path, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval")
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        losses_of = []
        for at, changes in ((build, {}), (tmp_path / "there" / "build", BOTH)):
            tiny.write_plan(at, **changes)
            losses_of.append(evaluate(at, device="cpu", progress=Silent())["models"]["teacher"]["held_out"]["loss"])
        assert losses_of[0] == losses_of[1]


class TestRefusals:
    def test_a_training_under_way_keeps_its_teacher(self, build: Path) -> None:
        run(build, tokens=64 * 4)
        tiny.write_plan(build, tokens=64 * 4, teacher__compute="float8")
        with pytest.raises(
            SpecInvalid, match=r"teacher\.compute: was bfloat16 when this training began and is now float8"
        ):
            train(build, device="cpu", progress=Silent())
        # The student's may change, as a training that moves to other devices asks for.
        assert "compute_dtype.cpu" not in deciding_settings(plan(compute_dtype__cpu="float8"))

    def test_without_the_library(self, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else real(name, *a))
        with pytest.raises(SpecInvalid) as error:
            run(build, **BOTH)
        text = str(error.value)
        for place in ("compute_dtype.cpu", "teacher.compute"):
            assert f"{place}: float8 is computed by torchao, which is not installed here" in text
        assert "pip install 'minitron[float8]' where the student is trained, or write bfloat16" in text
        assert not (build / "train" / "data").exists()  # before anything long

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
    def test_a_device_that_cannot(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
        wanted = plan(compute_dtype__cuda="float8")
        if capability >= (8, 9):
            float8.require_float8(wanted, torch.device("cuda"))
            return
        message = "compute_dtype.cuda: NVIDIA A100-SXM4-80GB has compute capability 8.0, and float8 needs 8.9 or later"
        with pytest.raises(Refused) as error:
            float8.require_float8(wanted, torch.device("cuda"))
        assert message in str(error.value) and "write bfloat16" in str(error.value)

    def test_code_that_reads_a_weight_itself(self, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.llama import modeling_llama

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
        with pytest.raises(
            SpecInvalid, match=r"teacher.compute: this model's code cannot compute in float8 \(.*'weight'"
        ):
            run(build, tokens=64, teacher__compute="float8")


def test_around_float8_a_gpu_computes_in_bf16() -> None:
    world = setup.World(0, 1, torch.device("cuda"))
    assert setup.compute_dtype_of(plan(compute_dtype__cuda="float8"), world) == torch.bfloat16
    assert setup.compute_dtype_of(plan(compute_dtype__cpu="float8"), setup.World(0, 1, CPU)) == torch.float32
