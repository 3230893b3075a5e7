"""The teacher on disk: its configuration, and the headers of its weight files. Nothing here reads a weight."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.hub import is_path, snapshot
from minitron.compiler.teacher.model_config import load_config
from minitron.compiler.teacher.other_formats import no_folder, what_to_do_instead
from minitron.compiler.teacher.refusals import check_not_quantised, check_one_for_all_layers
from minitron.compiler.teacher.text_config import text_config
from minitron.compiler.teacher.tokenizer import tokenizer_files
from minitron.specs.builds import CONFIG
from minitron.specs.errors import Problem, Refused, UsageError, WorkError, first_line
from minitron.specs.model_config import read_model_config
from minitron.specs.weight_files import (
    INDEX,
    SINGLE,
    TensorInfo,
    check_no_adapter,
    find_weight_files,
    indexed_files,
    read_headers,
)

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md")

# Dtypes that a teacher is held in as its files have it, as safetensors spells them.
OWN_DTYPES = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Tower:
    """The multimodal model that a language tower was taken from.

    config  its configuration
    stored  the tower's tensors by name -> their names in the files of the whole model
    others  the tensors of the other towers and the projector, by their names in the files
    """

    config: Any
    stored: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of a teacher in Hugging Face format: `folder` holds its files, `tensors` is empty where only the
    configuration is there.

    `commit` is that of a model from the Hub, whose weights need not be on this machine for a plan: then `tensors` came
    over the network, headers only; None for a folder of the user's own. `remark` says what could not be inspected.
    Where the head is untied (`teacher.untie`), `tied_config` is the configuration in the folder and `aliases` names the
    stored tensors of parameters that have none of their own.

    Where the language tower of a multimodal model is the teacher (`teacher.tower`), configuration and tensors are the tower's,
    and `tower` says what it was taken from.
    """

    name: str
    folder: Path
    config: Any
    tensors: Mapping[str, TensorInfo]
    commit: str | None = None
    remark: str = ""
    tied_config: Any = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    tower: Tower | None = None

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of the weights are in, or that the configuration says where no weights are there.
        Floats of eight bits are held as bfloat16: modules do not compute in them."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.nbytes
        if sizes:
            return OWN_DTYPES.get(sizes.most_common(1)[0][0], "bfloat16")
        said = str(getattr(self.config, "dtype", None)).removeprefix("torch.")
        return said if said in OWN_DTYPES.values() else "bfloat16"

    @property
    def on_disk(self) -> bool:
        """Checks whether the weights are on this machine."""
        return bool(self.tensors) and all(file.is_file() for file in {info.file for info in self.tensors.values()})


class BrokenWeights(WorkError):
    """The error for weight files that are damaged or missing; `checkpoint` is everything else."""

    def __init__(self, message: str, checkpoint: Checkpoint) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def open_checkpoint(model: str, revision: str | None, base: Path, *, weights: bool, tower: bool = False) -> Checkpoint:
    """Opens a folder (relative to `base`) or a Hub id, of which the small files are fetched and the headers of the large
    ones.

    With `weights` those of a folder must be there, and all small files of a model from the Hub: `fetch_weights`
    follows. With `tower` the language tower of a multimodal model is opened. Raises UsageError where the model cannot be
    found or its configuration not be read; BrokenWeights for weight files.
    """
    local = (base / model).expanduser()
    if local.is_dir():
        return read_checkpoint(model, local.resolve(), weights=weights, tower=tower)
    if is_path(model, base):
        raise UsageError("; ".join(no_folder(local)))
    found = snapshot(model, revision, SMALL_FILES, enough=[] if weights else [CONFIG])
    return read_checkpoint(model, found.folder, weights=False, commit=found.commit, tower=tower)


def fetch_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with its weights on this machine: those of a model from the Hub are fetched, at its
    commit.

    Errors as for `open_checkpoint`.
    """
    if checkpoint.commit is None:
        return checkpoint
    found = snapshot(checkpoint.name, checkpoint.commit, [*SMALL_FILES, *_wanted(checkpoint.folder)])
    tower = checkpoint.tower is not None
    return read_checkpoint(checkpoint.name, found.folder, weights=True, commit=checkpoint.commit, tower=tower)


def _wanted(folder: Path) -> list[str]:
    """Returns the names of the weight files to be fetched: some repositories hold the same weights once more, for other
    programs."""
    index = folder / INDEX
    return [SINGLE, *(indexed_files(index) if index.is_file() else [])]


def read_checkpoint(
    name: str, folder: Path, *, weights: bool, commit: str | None = None, tower: bool = False
) -> Checkpoint:
    """Reads the checkpoint in a folder. Errors as for `open_checkpoint`."""
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be read (permission denied); check its permissions")
    config, whole = _read_config(name, folder, tower)
    taken_from = None if whole is None else Tower(whole)
    empty = Checkpoint(name, folder, config, {}, commit, tower=taken_from)
    try:
        tensors, remark = _inspect(name, folder, weights, commit)
    except WorkError as error:
        raise BrokenWeights(str(error), empty) from None
    return replace(empty, tensors=tensors, remark=remark)


def _inspect(name: str, folder: Path, weights: bool, commit: str | None) -> tuple[dict[str, TensorInfo], str]:
    """Returns the tensors, and a remark: the reason where no tensors could be read, or the files that were ignored."""
    # In the Hub's cache a part of the weight files is what a download that was not finished leaves.
    tensors, remark = _read_headers(folder, parts_will_do=commit is not None and not weights)
    if weights and not tensors:
        if commit is not None:
            raise WorkError(
                f"{name}: no weights in safetensors format, neither in the local cache nor on the Hugging Face Hub; "
                f"offline, run `hf download {name} --revision {commit}` where there is a network"
            )
        raise WorkError(f"{folder}: no weights in safetensors format; {what_to_do_instead(folder)}")
    if not tensors and commit is not None:
        tensors, remark = _remote_headers(name, folder, commit)
    elif not tensors:
        remark = "no weight files are there: tensor names and shapes could not be compared with the configuration"
    return tensors, remark


def _read_config(model: str, folder: Path, tower: bool) -> tuple[Any, Any]:
    """The configuration of the teacher, and that of the whole model where the teacher is its language tower."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    check_no_adapter(folder)
    path = folder / CONFIG
    raw = read_model_config(folder)
    kind = raw["model_type"]
    if "auto_map" in raw and kind not in CONFIG_MAPPING:
        raise UsageError(
            f"{path}: the code of a {kind} model comes with its checkpoint (auto_map), and such code is never "
            "run; name a model of a type that transformers itself knows"
        )
    check_not_quantised(folder, raw)
    config = load_config(folder)
    list(tokenizer_files(folder))  # none of which is a link that leads elsewhere
    text = text_config(model, config)
    if text is not None and not tower:
        raise UsageError(
            f"{model} is a {config.model_type} model of several towers; write `tower: language_model` under `teacher` to "
            f"narrow its language tower ({text.model_type}) and keep the others"
        )
    if text is None and tower:
        raise Refused(
            [Problem("teacher.tower", f"{model} is a {config.model_type} model of one tower", "leave `tower` out")]
        )
    config, whole = (config, None) if text is None else (text, config)
    check_one_for_all_layers(path, config)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"{model} is a {config.model_type} model, which transformers does not know as a causal language model; "
            "name a decoder-only text model"
        )
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise UsageError(f"{path} has no num_hidden_layers; models of several towers are not supported")
    if layers < 1:
        raise UsageError(f"{path} says that the model has {layers} layers; copy the file again from its source")
    return config, whole


def _read_headers(folder: Path, *, parts_will_do: bool) -> tuple[dict[str, TensorInfo], str]:
    """Reads the tensors of a folder, and a remark on the files that are ignored there."""
    try:
        files = find_weight_files(folder)
    except WorkError:
        if parts_will_do:
            return {}, ""
        raise
    return read_headers(files), "; ".join(files.remarks)


def _remote_headers(model: str, folder: Path, commit: str) -> tuple[dict[str, TensorInfo], str]:
    """Fetches the headers of weight files that lie on the Hub only, some kilobytes of each; returns the reason where
    that fails."""
    from huggingface_hub import HfApi

    try:
        index = folder / INDEX
        tensors: dict[str, TensorInfo] = {}
        for name in indexed_files(index) if index.is_file() else [SINGLE]:
            header = HfApi().parse_safetensors_file_metadata(model, name, revision=commit)
            for tensor, info in header.tensors.items():
                begin, end = info.data_offsets
                tensors[tensor] = TensorInfo(folder / name, str(info.dtype), tuple(info.shape), end - begin)
        return tensors, ""
    except Exception as error:  # network, permissions, other formats: the plan does without
        return {}, (
            f"could not read the safetensors headers of {model} ({first_line(error)}): tensor names and shapes could not be "
            "compared with the configuration"
        )
