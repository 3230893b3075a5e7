"""Translation validation: is the student that was written the function that was asked for?

Each check compares two independent routes. One that fails fails the compile.

    widths       the widths asked for are those of the checkpoint, by its configuration and by its tensors
    reload       the rewritten graph on weights in memory  =  the Hugging Face model loaded fresh from student/
    masked       the teacher with everything dropped set to zero  =  the rewritten graph, where that is mathematically so
    permutation  the teacher with every narrowed axis permuted  =  the teacher
    rotation     the teacher on the principal components of its residual stream, all kept  =  the teacher
    program      student.pt2 run by plain torch on student/'s weights  =  the Hugging Face model
    head         the description of the head in training.yaml yields the Hugging Face model's logits
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from minitron.compiler.capture.models import quiet, stored_tensors
from minitron.compiler.emit.program import run_program
from minitron.specs.builds import CONFIG, PROGRAM, STUDENT
from minitron.specs.errors import WorkError, first_line
from minitron.specs.training_plan import HeadPlan

# Both routes run in fp32 and differ by the order of sums only; a wrong channel is off by far more than this.
TOLERANCE = 1e-4
PROGRAM_TOLERANCE = 0.1
SAMPLE = (2, 48)


@dataclass(frozen=True)
class Check:
    """`max_error` is the largest difference of logits over the largest logit; `exact` says what it was held against."""

    name: str
    passed: bool
    exact: bool
    max_error: float
    tolerance: float
    detail: str

    def __str__(self) -> str:
        numbers = (
            f" (error {self.max_error:.2e}, allowed {self.tolerance:.0e})" if math.isfinite(self.max_error) else ""
        )
        return f"`{self.name}`: {self.detail}{numbers}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "exact": self.exact,
            "max_error": self.max_error if math.isfinite(self.max_error) else None,  # JSON has no infinity
            "tolerance": self.tolerance,
            "detail": self.detail,
        }


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor, detail: str, tolerance: float = TOLERANCE) -> Check:
    """The relative error of logits; a shape that differs or a number that is none fails."""
    if got.shape != wanted.shape:
        return Check(
            name, False, True, float("inf"), tolerance, f"{detail}: {list(got.shape)} against {list(wanted.shape)}"
        )
    scale = max(float(wanted.abs().max()), 1e-6)
    error = float((got.double() - wanted.double()).abs().max()) / scale
    return Check(name, error <= tolerance, True, error, tolerance, detail)


def exactly(name: str, mistake: str | None, detail: str) -> Check:
    """A comparison without a tolerance: `mistake` is the first difference in words, None where there is none."""
    return Check(name, mistake is None, True, 0.0 if mistake is None else math.inf, 0.0, mistake or detail)


def broken(name: str, error: WorkError) -> Check:
    """A comparison that did not come about because a side of it does not work at all."""
    return Check(name, False, True, float("inf"), TOLERANCE, str(error))


def skipped(name: str, detail: str) -> Check:
    """A comparison that mathematics does not allow here: nothing is claimed."""
    return Check(name, True, False, 0.0, 0.0, detail)


def check_widths(
    folder: Path, wanted: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]
) -> Check:
    """`wanted`: configuration key -> width; `shapes`: the tensors that were planned, `got`: those of the loaded
    model."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    wrong = [f"{key} is {config.get(key)}, not {width}" for key, width in wanted.items() if config.get(key) != width]
    wrong += [f"{name} is {got.get(name)}, not {shape}" for name, shape in shapes.items() if got.get(name) != shape]
    return exactly("widths", "; ".join(wrong[:3]) or None, "as asked for")


def sample_ids(vocab_size: int, length: int, samples: torch.Tensor | None) -> torch.Tensor:
    """Token ids [2, length] to compare on: calibration data (shorter where that is), else random ones."""
    rows = SAMPLE[0]
    if samples is not None and samples.shape[0] >= rows:
        return samples[:rows, :length].contiguous()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)


def load_student(folder: Path, attention: str) -> Any:
    """The Hugging Face model of a folder in fp32, as any user loads it. WorkError with transformers' words."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers raises anything
        reason = first_line(error)
        raise WorkError(f"{folder} cannot be loaded back by transformers: {reason}") from None
    problems = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if problems:
        raise WorkError(
            f"{folder} does not load back whole: {problems[0]} and {len(problems) - 1} more tensors are off"
        )
    return model.eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]. WorkError where the model, though it loads, does not run."""
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what operators raise of shapes that do not fit
        reason = first_line(error)
        raise WorkError(f"the student loads, but does not run in transformers: {reason}") from None


def check_program(
    build: Path,
    model: Any,
    ids: torch.Tensor,
    wanted: torch.Tensor,
    dtype: torch.dtype,
    *,
    streamed: bool,
    custom: bool,
) -> Check:
    """Runs student.pt2 in its own dtype, on the files of student/. `custom`: as for `run_program`.

    Where transformers converts a checkpoint while loading it, the files have other names than the model's parameters:
    then the loaded model's own are written out for the comparison.
    """
    try:
        if streamed:
            got = run_program(build / PROGRAM, sorted((build / STUDENT).glob("*.safetensors")), ids, custom=custom)
        else:
            with tempfile.TemporaryDirectory(dir=build, prefix=".minitron-weights.", suffix=".tmp") as folder:
                path = Path(folder) / "weights.safetensors"
                weights = {name: value.detach().to(dtype).contiguous() for name, value in stored_tensors(model).items()}
                save_file(weights, path)
                got = run_program(build / PROGRAM, [path], ids, custom=custom)
    except WorkError as error:
        return broken("program", error)
    if dtype == torch.float32:
        return compare("program", got, wanted, "student.pt2 on student/'s weights against the Hugging Face model")
    # Activations are rounded to the program's dtype at every operator, and routers may decide by a rounding.
    detail = f"student.pt2 in {str(dtype).removeprefix('torch.')} against the Hugging Face model in float32"
    return compare("program", got.float(), wanted, detail, PROGRAM_TOLERANCE)


def check_head(model: Any, head: HeadPlan, ids: torch.Tensor, wanted: torch.Tensor) -> Check:
    with torch.no_grad():
        hidden = model.get_submodule(head.backbone)(input_ids=ids, use_cache=False).last_hidden_state
        parameters = dict(model.named_parameters(remove_duplicate=False))
        z = hidden @ parameters[head.weight].T
        if head.bias is not None:
            z = z + parameters[head.bias]
        z = z * head.scale
        logits = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return compare("head", logits, wanted, "the head that the loss uses against the Hugging Face model")


def permuted(narrowing: Narrowing, seed: int = 0) -> Narrowing:
    """The same leaves, each permuted instead of narrowed."""
    rng = np.random.default_rng(seed)
    kept: dict[Any, Indices] = {
        leaf: rng.permutation(leaf.size.coefficient).astype(np.int64) for leaf in narrowing.kept
    }
    dependent = {
        leaf: Dependent(
            one.parents,
            [rng.permutation(leaf.size.coefficient).astype(np.int64) for _ in one.lists],
            leaf.size.coefficient,
        )
        for leaf, one in narrowing.dependent.items()
    }
    return Narrowing(narrowing.space, kept, dependent)


def failed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]
