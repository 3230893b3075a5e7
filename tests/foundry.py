"""Teachers, texts and compiles for the tests of the compiler, each made once in a session and then only read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from minitron.compiler import Plan, compile_spec, make_plan
from minitron.compiler.capture import capture as capture_module
from minitron.compiler.capture.models import build_meta, quiet
from minitron.compiler.compile import Stages, verify
from minitron.compiler.emit import program as program_module
from minitron.compiler.graph.executor import Executor, Feeding, Settings
from minitron.compiler.graph.names import Fetch
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.select import Selection
from minitron.compiler.verify.checks import Check, skipped
from minitron.compiler.verify.program import program as program_check
from minitron.compiler.verify.routes import Routes
from minitron.compiler.verify.run import STUDENT_CHECKS, TEACHER_CHECKS
from minitron.compiler.verify.selection import selection as selection_check
from minitron.compiler.weights.buffers import load_buffers
from minitron.compiler.weights.source import open_weights
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.progress import Progress, Silent
from tests import models

LONGEST_NAME = 200  # characters of a folder's name; file systems take 255 bytes

CALIBRATION: dict[str, Any] = {"document": "line", "samples": 6, "sequence_length": 48}


def _program_left_out(routes: Routes) -> Check:
    return skipped("program", "left out in this test")


# The checks that every compile makes.
CHECK_NAMES = {check.__name__ for check in (*TEACHER_CHECKS, *STUDENT_CHECKS)} - {"files", "coordinates", "rotation"}


def stages_of(*, program: bool = True, selection: Selection | None = None) -> Stages:
    """The stages of a compile that may write no student.pt2, in half the time, and may take a selection that no scores
    asked for."""
    checks = [check for check in STUDENT_CHECKS if selection is None or check is not selection_check]
    stages = Stages() if selection is None else Stages(select=lambda plan, scores: selection)
    if not program:
        checks = [_program_left_out if check is program_check else check for check in checks]
        stages = replace(stages, write_program=lambda compilation, student: None)
    return replace(stages, verify=partial(verify, wanted=checks))


WITHOUT_PROGRAM = stages_of(program=False)


@dataclass(frozen=True)
class Folder:
    """What a compile leaves, however it ends."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.document("student/config.json")

    @cached_property
    def checks(self) -> dict[str, dict[str, Any]]:
        """The checks of verification.json by name."""
        return {check["name"]: check for check in self.document("verification.json")["checks"]}

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The student's weights."""
        return self.tensors_of("student/*.safetensors")

    def tensors_of(self, pattern: str) -> dict[str, torch.Tensor]:
        """The tensors of one or more safetensors files."""
        files = sorted(self.folder.glob(pattern))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def document(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return document


@dataclass(frozen=True)
class Build(Folder):
    """A compile that ended well."""

    loaded: LoadedSpec
    plan: Plan

    @property
    def teacher(self) -> Path:
        return self.plan.checkpoint.folder


class Foundry:
    """A folder with texts, teachers, specs and builds."""

    def __init__(self, root: Path, apprentice: Apprentice) -> None:
        self.root = root
        self.calibration = CALIBRATION | {"text": [str(root / "corpus.txt")]}
        self.apprentice = apprentice
        (root / "corpus.txt").write_text(models.text(150), encoding="utf-8")
        self._builds: dict[str, Build] = {}
        self._captured: dict[str, Any] = {}

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Two savings that change no result: a model is captured once however often it is compiled, and student.pt2 is
        run by a process that stands ready."""
        original = capture_module.capture

        def capture(config: Any, dtype: torch.dtype = torch.float32, *rest: Any) -> Any:
            key = f"{config.model_type} {dtype} {rest} {config.to_json_string(use_diff=False)}"
            if key not in self._captured:
                self._captured[key] = original(config, dtype, *rest)
            return self._captured[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(capture_module, "capture", capture)
            patch.setattr(program_module, "subprocess", self.apprentice)
            yield

    def teacher(self, family: str, dtype: str = "float32", **changes: Any) -> Path:
        """The checkpoint of a tiny model; `changes` replace configuration keys."""
        name = "-".join([family, dtype, *(f"{key}={value}" for key, value in sorted(changes.items()))])
        if len(name) > LONGEST_NAME:
            name = f"{family}-{hashlib.sha256(name.encode()).hexdigest()}"
        folder = self.root / name.replace("/", "")
        if not folder.exists():
            models.save_teacher(folder, models.tiny_config(family, **changes), getattr(torch, dtype))
        return folder

    def load(
        self, teacher: Path, student: dict[str, Any], *, dtype: str | None = "float32", **blocks: Any
    ) -> LoadedSpec:
        """A spec file, read. `blocks` stand beside teacher, student and importance, or replace them."""
        document = {
            "name": "tiny",
            "teacher": {"model": str(teacher), "dtype": dtype},
            "student": student,
            "importance": {"data": self.calibration},
        } | blocks
        text = yaml.safe_dump({key: value for key, value in document.items() if value is not None}, sort_keys=False)
        number = len(list(self.root.glob("spec-*.yaml")))
        path = self.root / f"spec-{number}.yaml"
        path.write_text(text, encoding="utf-8")
        return load_spec(path)

    def plan(self, teacher: Path, student: dict[str, Any], **blocks: Any) -> Plan:
        """What `minitron plan` knows, with weights at hand."""
        loaded = self.load(teacher, student, **blocks)
        with self.shortened():
            return make_plan(loaded, build=self.root / f"build-of-{loaded.path.stem}", weights=True)

    def whole(self, family: str, dtype: str = "float32", **changes: Any) -> Plan:
        """A plan that narrows nothing: for what is asked of a teacher alone."""
        layers = models.tiny_config(family, **changes).num_hidden_layers
        return self.plan(self.teacher(family, dtype, **changes), {"num_hidden_layers": layers}, dtype=dtype)

    def build(self, teacher: Path, student: dict[str, Any], *, program: bool = True, **blocks: Any) -> Build:
        """A compile by the real driver, made once for all tests that ask for it: to be read only."""
        key = json.dumps([str(teacher), student, blocks, program], sort_keys=True)
        if key not in self._builds:
            loaded = self.load(teacher, student, **blocks)
            folder = self.root / f"build-of-{loaded.path.stem}"
            self._builds[key] = self.compile(loaded, folder, program=program)
        return self._builds[key]

    def compile(
        self,
        loaded: LoadedSpec,
        folder: Path,
        progress: Progress | None = None,
        *,
        program: bool = True,
        selection: Selection | None = None,
        stages: Stages | None = None,
        plan: Plan | None = None,
    ) -> Build:
        """`compile_spec` on the CPU, into a folder of the caller's own. `selection` is taken instead of one by scores."""
        stages = stages or stages_of(program=program, selection=selection)
        if selection is not None and loaded.spec.importance.hidden_basis == "channels":
            stages = replace(stages, score=lambda _: (ScoreTable(), None))
        with self.shortened():
            plan = compile_spec(loaded, folder, device="cpu", progress=progress or Silent(), plan=plan, stages=stages)
            return Build(folder, loaded, plan)


def teacher_model(plan: Plan) -> Any:
    """The teacher as any user loads it, in fp32."""
    return load_model(plan.checkpoint.folder, plan.teacher.captured.attention)


def load_model(folder: Path, attention: str = "sdpa") -> Any:
    """The Hugging Face model of a folder, in fp32."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]"""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return result


def token_ids(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Any token ids [rows, length]."""
    return torch.randint(0, models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def executor(plan: Plan, fetch: Fetch | None = None, **how: Any) -> Executor:
    """The teacher's graph, ready to run on the weights of its checkpoint, as `executor_of` runs any other."""
    return executor_of(plan, plan.teacher.captured.graph_module, fetch, **how)


def executor_of(
    plan: Plan,
    graph: GraphModule,
    fetch: Fetch | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    feeding: Feeding = Feeding(),
    fast: bool = False,
) -> Executor:
    """A graph made from the teacher's, ready to run. `fast`: as calibration runs it."""
    captured = plan.teacher.captured
    buffers = load_buffers(build_meta(captured.config, dtype, captured.attention))
    settings = Settings("cpu", dtype, plan.dtype)
    fetch = fetch or open_weights(captured, plan.checkpoint).get
    return Executor(graph, captured.layer_of, fetch, buffers, settings, feeding, fast_attention=fast)


class Apprentice:
    """Runs Python sources one after the other in one process that has imported torch already.

    Stands in for `subprocess` where a test is not about the process: what costs is the start, and a compile starts one.
    """

    _LOOP = (
        "import json, sys, traceback, torch, safetensors.torch\n"
        "for line in sys.stdin:\n"
        "    source, *sys.argv[1:] = json.loads(line)\n"
        "    try:\n"
        "        exec(compile(source, 'job', 'exec'), {'__name__': '__main__'})\n"
        "        print(json.dumps([0, '']), flush=True)\n"
        "    except BaseException:\n"
        "        print(json.dumps([1, traceback.format_exc()]), flush=True)\n"
    )

    def __init__(self) -> None:
        self.jobs = 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", self._LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """`command` is [python, "-P", "-c", source, arguments..] as `subprocess.run` takes it."""
        assert command[:3] == [sys.executable, "-P", "-c"]
        assert self._process.stdin is not None and self._process.stdout is not None
        self.jobs += 1
        self._process.stdin.write(json.dumps(command[3:]) + "\n")
        self._process.stdin.flush()
        code, error = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(command, code, "", error)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
