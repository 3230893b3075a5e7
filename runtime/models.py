"""Hugging Face models, split into backbone and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from minitron.runtime.loss import Head
from minitron.runtime.plan import LoadedPlan
from minitron.specs.builds import CONFIG
from minitron.specs.errors import Problem, Refused, WorkError, first_line
from minitron.specs.generation_settings import FILE as GENERATION
from minitron.specs.generation_settings import read_generation_settings
from minitron.specs.model_config import alone, positions_of, read_model_config
from minitron.specs.shards.stream import Largest
from minitron.specs.training_plan import HeadPlan, ModelPlan
from minitron.specs.weight_files import SINGLE, find_weight_files, read_headers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HEAD_TOLERANCE = 0.02
"""The tolerance as a share of the largest logit. bf16 rounds by 0.4%; a scale, bias or soft-cap that was read wrongly
changes more than that.
"""

T = TypeVar("T")

Tokenizer = Any
"""A transformers tokenizer; the library has no type annotations."""


@dataclass(frozen=True)
class LanguageModel:
    """A module, and how its logits are computed from the hidden states of its backbone."""

    module: Any
    plan: HeadPlan
    layer_list: str | None = None
    """The submodule that lists the decoder layers, where the plan names one."""
    root: Any = None
    """The module that gathers the weights outside the layers, where weights are sharded over ranks (`sharding.py`)."""

    def gathered(self, work: Callable[[], T]) -> T:
        """Calls `work` while embedding, last norm and head are whole, wherever the weights lie: every computation with
        the model runs inside this call. Where the weights are sharded, all ranks call this method equally often.
        """
        return work() if self.root is None else self.root(work)

    def rest(self) -> None:
        """Reshards the weights that a computation without gradients left gathered, so that each rank holds its own rows
        only.
        """
        if self.root is not None:
            self.root.reshard()

    def hidden_states(self, input_ids_BL: Tensor) -> Tensor:
        """Returns the hidden states [B, L, D] that the head reads. No logits are computed and no cache is kept."""
        backbone = self.module.get_submodule(self.plan.backbone)
        hidden: Tensor = backbone(input_ids=input_ids_BL, use_cache=False).last_hidden_state
        return hidden

    @property
    def head(self) -> Head:
        """Returns the head with the module's own parameters, so that gradients reach them."""
        bias = None if self.plan.bias is None else self.module.get_parameter(self.plan.bias)
        return Head(self.module.get_parameter(self.plan.weight), bias, self.plan.scale, self.plan.softcap)

    @property
    def layers(self) -> torch.nn.ModuleList | None:
        """Returns the decoder layers, in order; None where the plan names none."""
        return None if self.layer_list is None else self.module.get_submodule(self.layer_list)

    @property
    def width(self) -> int:
        """Returns the number of channels of the hidden states."""
        return int(self.head.weight_VD.shape[1])

    @property
    def positions(self) -> int | None:
        """Returns the number of positions that the model can read, where its configuration states it; else None."""
        return positions_of(self.module.config)

    @property
    def parameters(self) -> int:
        """Counts the parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def readable(folder: Path) -> int | None:
    """Returns the number of positions that the model in `folder` can read, where its configuration states it; else
    None. WorkError for a broken configuration.
    """
    return positions_of(model_config(folder))


Place = Callable[[LanguageModel], LanguageModel]
"""Puts a model that was read onto its device, or spreads it over the ranks."""


def load_model(
    loaded: LoadedPlan, at: str, plan: ModelPlan, dtype: torch.dtype, device: torch.device, place: Place | None = None
) -> LanguageModel:
    """Loads the model that the plan names under `at` (`teacher` or `student`), in eval mode, its head checked.

    `place` is called with the model on the CPU, in the dtype of its files where that is narrower than `dtype`; with
    None the model goes to `device` in `dtype`. Refused where the plan and the model do not fit, UsageError where there
    is not a model, WorkError for broken files.
    """
    folder = model_folder(loaded, at, plan)
    if place is not None and stored_in(folder, "BF16"):
        dtype = torch.bfloat16
    return open_model(folder, dtype, device, plan, at, place)


def model_folder(loaded: LoadedPlan, at: str, plan: ModelPlan) -> Path:
    """Returns the folder that holds a model of the plan; a model named by its Hugging Face id is downloaded."""
    folder = loaded.folder / plan.model
    if folder.is_dir():
        return folder
    if at == "student" or plan.model.startswith((".", "/")) or plan.model.count("/") != 1:
        hint = "write where the model is, or compile again"
        raise Refused([Problem(f"{at}.model", f"there is no folder {folder}", hint)])
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
        revision = getattr(plan, "revision", None)
        return Path(snapshot_download(plan.model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # network, permissions, cache: a dozen kinds for one thing: it could not be fetched
        reason = first_line(error)
        raise WorkError(
            f"{plan.model} cannot be fetched from the Hugging Face Hub ({reason}); go online, or write a folder"
        ) from None


def open_model(
    folder: Path, dtype: torch.dtype, device: torch.device, plan: ModelPlan, at: str, place: Place | None = None
) -> LanguageModel:
    """Opens the model in `folder`, with the head and the layers that the `plan` at the dotted path `at` names.

    On a CPU the weights are held in fp32: it represents bf16 weights exactly, and without bf16 instructions, which most
    CPUs lack, computing in bf16 takes several times as long.
    """
    module = open_module(folder, torch.float32 if device.type == "cpu" else dtype)
    model = LanguageModel(module, plan.head, plan.layers)
    _check_names(model, at)
    if place is None:
        module.to(device)
    else:
        model = place(model)
    with torch.no_grad():
        differs = model.gathered(lambda: _gives_other_logits(model, device))
    model.rest()
    if differs:
        hint = "`bias`, `scale` or `softcap` is wrong: compile again"
        raise Refused([Problem(f"{at}.head", "does not give the logits that the model gives", hint)])
    return model


def open_module(folder: Path, dtype: torch.dtype | Literal["auto"]) -> Any:
    """Opens the transformers model in `folder` on the CPU, in eval mode; `auto` stands for the dtype of its
    configuration.
    """
    weight_files(folder)
    config = model_config(folder)
    try:
        with quiet():
            module, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                generation_config=_generation(folder, config),
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = first_line(error)
        raise WorkError(f"{folder} cannot be loaded as a language model ({reason}); make it again") from None
    if absent := sorted(report["missing_keys"]):
        raise WorkError(
            f"{folder}: the weights of {absent[0]} ({len(absent)} missing) are not in its files; make it again"
        )
    return module.eval()


def _generation(folder: Path, config: Any) -> GenerationConfig:
    """Returns the generation settings of the model in a folder: its generation_config.json, or else the special tokens
    of its configuration.
    """
    settings = read_generation_settings(folder)
    if settings is None:
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {key: getattr(config, key, None) for key in tokens}
    try:
        return GenerationConfig(**settings)
    except Exception as error:  # it checks values, and a wrong one is the file's fault
        raise WorkError(
            f"{folder / GENERATION} cannot be used ({first_line(error)}); correct it, or remove it"
        ) from None


def _check_names(model: LanguageModel, at: str) -> None:
    """Checks that the head and the list of layers that the plan names exist in the model."""
    module, plan = model.module, model.plan
    for key, find in (
        ("backbone", module.get_submodule),
        ("weight", module.get_parameter),
        ("bias", module.get_parameter),
    ):
        name = getattr(plan, key)
        if name is not None:
            try:
                find(name)
            except AttributeError:
                message = f"the model has no `{name}`"
                raise Refused([Problem(f"{at}.head.{key}", message, "compile again, or correct it")]) from None
    try:
        layers = model.layers
    except AttributeError:
        layers = None
    if model.layer_list is not None and not isinstance(layers, torch.nn.ModuleList):
        message = f"the model has no list of layers `{model.layer_list}`"
        raise Refused([Problem(f"{at}.layers", message, "compile again, or correct it")])


def _gives_other_logits(model: LanguageModel, device: torch.device) -> bool:
    """Checks whether the head as the plan describes it gives other logits than the module itself. (Where weights are
    not finite nothing is compared: training reports them, and saves the batch.)
    """
    ids = torch.arange(8, device=device).unsqueeze(0) % model.head.vocabulary
    hidden = model.hidden_states(ids)[0].float()
    logits = hidden @ model.head.weight_VD.float().T
    model.head.finish_(logits)
    expected = model.module(input_ids=ids, use_cache=False).logits[0].float()
    return bool((logits - expected).abs().max() > _HEAD_TOLERANCE * expected.abs().max().clamp(min=1e-3))


def weight_files(folder: Path) -> list[Path]:
    """Lists the safetensors files of a checkpoint, found as the compiler finds them. WorkError where there are none or
    one is missing.
    """
    files = find_weight_files(folder)
    if not files.paths:
        raise WorkError(f"{folder} has no {SINGLE}; only safetensors weights are read, make the model again")
    return list(files.paths)


def weight_bytes(folder: Path) -> int:
    """Returns the bytes of all tensors in a checkpoint, from the headers of its files."""
    return sum(info.nbytes for info in read_headers(weight_files(folder)).values())


def stored_in(folder: Path, dtype: str) -> bool:
    """Checks whether all tensors of a checkpoint have this dtype, as safetensors spells it."""
    return all(info.dtype == dtype for info in read_headers(weight_files(folder)).values())


def model_config(folder: Path) -> Any:
    """Reads the configuration of the model in a folder, without keys that only change how the model is called.
    UsageError or WorkError where it cannot be read.
    """
    raw = read_model_config(folder)
    try:
        with quiet(), alone({key: value for key, value in raw.items() if key != "auto_map"}) as only_config:
            return AutoConfig.from_pretrained(only_config, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # configuration classes raise anything; all of it is the file's fault
        reason = first_line(error)
        raise WorkError(f"{folder} has no configuration that can be read ({reason}); make the model again") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer in `folder` without its warnings about long texts: texts are cut into sequences later."""
    if not folder.is_dir():
        raise WorkError(f"there is no folder {folder}, where the tokenizer should be; compile again")
    try:
        with quiet():
            config = model_config(folder) if (folder / CONFIG).is_file() else None
            return AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False, local_files_only=True, model_max_length=int(1e30)
            )
    except Exception as error:  # a wrong file surfaces as whatever its reader stumbles over
        reason = first_line(error)
        raise WorkError(
            f"{folder} has no tokenizer that can be loaded ({reason}); copy the teacher's files there"
        ) from None


def check_vocabularies(
    loaded: LoadedPlan,
    teacher: LanguageModel | None,
    student: LanguageModel,
    tokenizer: Tokenizer,
    read: Iterable[Largest],
) -> None:
    """Checks that teacher and student have the same vocabulary, with all tokens that were read. Refused where they do
    not.
    """
    ours = student.head.vocabulary
    if teacher is not None and (theirs := teacher.head.vocabulary) != ours:
        message = f"the teacher has a vocabulary of {theirs} tokens and the student one of {ours}"
        raise Refused(
            [Problem("teacher.model", message, "distillation compares them token by token: use one tokenizer")]
        )
    check_read(student, tokenizer, read)
    if teacher is not None:
        _check_tokenizer(loaded, tokenizer)


def check_teacher(loaded: LoadedPlan, teacher: LanguageModel, tokenizer: Tokenizer, read: Iterable[Largest]) -> None:
    """Checks that the teacher has the tokenizer's vocabulary, with all tokens that were read. Refused where it does
    not.
    """
    check_read(teacher, tokenizer, read)
    _check_tokenizer(loaded, tokenizer)


def check_read(model: LanguageModel, tokenizer: Tokenizer, read: Iterable[Largest]) -> None:
    """Checks that the model has an embedding row for every token that was read; a tokenizer may have tokens that no
    document contains. Refused, with token and document, where a row is missing.
    """
    ours = model.head.vocabulary
    for largest in read:
        if largest.id >= ours:
            token = tokenizer.convert_ids_to_tokens(largest.id) if largest.id < len(tokenizer) else None
            named = f" (`{token}`)" if token is not None else ""
            message = f"{largest.where} holds token {largest.id}{named}, and the models have a vocabulary of {ours}"
            hint = "leave that document out of the data, or write the folder with the teacher's tokenizer"
            raise Refused([Problem("tokenizer", message, hint)])


def _check_tokenizer(loaded: LoadedPlan, tokenizer: Tokenizer) -> None:
    folder = model_folder(loaded, "teacher", loaded.plan.teacher)
    if (folder / "tokenizer_config.json").is_file() and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        message = "its tokens are not those of the teacher's tokenizer"
        raise Refused([Problem("tokenizer", message, "write the folder with the teacher's tokenizer")])


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the library's own progress bars and warnings: problems that matter are raised as our own errors."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
