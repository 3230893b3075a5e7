"""The teacher on disk: its configuration, and the headers of its weight files. Nothing here reads a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.hub import snapshot
from minitron.specs.builds import CONFIG
from minitron.specs.errors import UsageError, WorkError

INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


LONGEST_REASON = 300  # characters of a library's message that are passed on


HEADER_LIMIT = 100_000_000  # the format's own bound on a header, in bytes


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weight file, from its header: `dtype` as safetensors spells it (BF16, F32, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint: `folder` holds its files, `tensors` is empty where only the configuration is there.

    `commit` is that of a model from the Hub, whose weights need not be on this machine for a plan: then `tensors` came
    over the network, headers only; None for a folder of the user's own. `remark` says what could not be inspected.
    """

    name: str
    folder: Path
    config: Any
    tensors: Mapping[str, TensorInfo]
    commit: str | None = None
    remark: str = ""

    @property
    def on_disk(self) -> bool:
        """Whether the weights are on this machine."""
        return bool(self.tensors) and all(file.is_file() for file in {info.file for info in self.tensors.values()})


class BrokenWeights(WorkError):
    """Weight files are damaged or missing; `checkpoint` is all else that there is."""

    def __init__(self, message: str, checkpoint: Checkpoint) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def open_checkpoint(model: str, revision: str | None, base: Path, *, weights: bool) -> Checkpoint:
    """A folder (relative to `base`) or a Hub id, of which the small files are fetched and the headers of the large ones.

    With `weights` those of a folder must be there, and all small files of a model from the Hub: `fetch_weights` follows.
    UsageError where the model cannot be found or its configuration not be read; BrokenWeights for weight files.
    """
    local = (base / model).expanduser()
    if local.is_dir():
        return read_checkpoint(model, local.resolve(), weights=weights)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(
            f"there is no folder {local}; write a folder relative to the spec, or a Hugging Face id (owner/name)"
        )
    found = snapshot(model, revision, SMALL_FILES, enough=[] if weights else [CONFIG])
    return read_checkpoint(model, found.folder, weights=False, commit=found.commit)


def fetch_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights on this machine: those of a model from the Hub are fetched, at its commit.

    Errors as for `open_checkpoint`.
    """
    if checkpoint.commit is None:
        return checkpoint
    found = snapshot(checkpoint.name, checkpoint.commit, [*SMALL_FILES, "*.safetensors"])
    return read_checkpoint(checkpoint.name, found.folder, weights=True, commit=checkpoint.commit)


def read_checkpoint(name: str, folder: Path, *, weights: bool, commit: str | None = None) -> Checkpoint:
    """The checkpoint in a folder. Errors as for `open_checkpoint`."""
    config = _read_config(name, folder)
    try:
        tensors, remark = _inspect(name, folder, weights, commit)
    except WorkError as error:
        raise BrokenWeights(str(error), Checkpoint(name, folder, config, {}, commit)) from None
    return Checkpoint(name, folder, config, tensors, commit, remark)


def _inspect(name: str, folder: Path, weights: bool, commit: str | None) -> tuple[dict[str, TensorInfo], str]:
    """The tensors, and why there are none."""
    # In the Hub's cache a part of the weight files is what a download that was not finished leaves.
    tensors = _read_headers(folder, parts_will_do=commit is not None and not weights)
    remark = ""
    if weights and not tensors:
        if commit is not None:
            raise WorkError(
                f"{name}: no weights in safetensors format, neither in the local cache nor on the Hugging Face Hub; "
                f"offline, run `hf download {name} --revision {commit}` where there is a network"
            )
        other = any(folder.glob("*.bin"))
        hint = "convert other formats with save_pretrained" if other else "copy the weight files there"
        raise WorkError(f"{folder}: no weights in safetensors format; {hint}")
    if not tensors and commit is not None:
        tensors, remark = _remote_headers(name, folder, commit)
    elif not tensors:
        remark = "no weight files are there: tensor names and shapes could not be compared with the configuration"
    return tensors, remark


def _read_config(model: str, folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); copy the file again from its source") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UsageError(f"{path} names no model_type; it is not the configuration of a Hugging Face model")
    if "auto_map" in raw and raw["model_type"] not in CONFIG_MAPPING:
        raise UsageError(
            f"{path}: the code of a {raw['model_type']} model comes with its checkpoint (auto_map), and such code is never "
            "run; name a model of a type that transformers itself knows"
        )
    if raw.get("quantization_config"):
        raise UsageError(
            f"{path}: the weights are quantized (quantization_config); name the checkpoint that they were made from, in "
            "bfloat16 or float32"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configuration classes raise anything; all of it is the file's fault
        raise UsageError(f"{path} cannot be read by transformers: {in_one_line(error)}") from None
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
    vars(config).pop("auto_map", None)  # names code that is not used, and that a student's folder would not have
    return config


def in_one_line(error: Exception) -> str:
    """What a library has to say, of which the second line often is the reason."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."


def file_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder; none where it has no weight files. WorkError where one is broken."""
    return _read_headers(folder, parts_will_do=False)


def _read_headers(folder: Path, *, parts_will_do: bool) -> dict[str, TensorInfo]:
    files = _weight_files(folder)
    if files is not None:
        present = [folder / name for name in files if (folder / name).is_file()]
        if parts_will_do and len(present) < len(files):
            return {}
        if present and len(present) < len(files):
            missing = next(name for name in files if not (folder / name).is_file())
            raise WorkError(f"{folder}: {missing} is named in {INDEX} and is not there; copy the checkpoint again")
    else:
        present = [path for path in [folder / SINGLE] if path.is_file()]
    tensors: dict[str, TensorInfo] = {}
    for path in present:
        tensors.update(read_header(path))
    return tensors


def _weight_files(folder: Path) -> list[str] | None:
    """The names in the index of a checkpoint in several files; None where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if strange := next((name for name in names if not isinstance(name, str) or Path(name).name != name), None):
            raise ValueError(f"{strange!r} is no name of a file beside it")
        return names
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WorkError(f"{index} is broken ({error}); copy the checkpoint again") from None


def _remote_headers(model: str, folder: Path, commit: str) -> tuple[dict[str, TensorInfo], str]:
    """The headers of weight files that lie on the Hub only, some kilobytes of each; and why not, where not."""
    from huggingface_hub import HfApi

    try:
        names = _weight_files(folder) or [SINGLE]
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            header = HfApi().parse_safetensors_file_metadata(model, name, revision=commit)
            for tensor, info in header.tensors.items():
                begin, end = info.data_offsets
                tensors[tensor] = TensorInfo(folder / name, str(info.dtype), tuple(info.shape), end - begin)
        return tensors, ""
    except Exception as error:  # network, permissions, other formats: the plan does without
        words = str(error).strip().splitlines()
        reason = words[0] if words else type(error).__name__
        return {}, (
            f"the headers of {model}'s weight files are not to be had ({reason}): tensor names and shapes could not be "
            "compared with the configuration"
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. WorkError where the file is broken or cut short."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size - 8, HEADER_LIMIT):
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(
                path, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise WorkError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    expected = 8 + length + sum(info.nbytes for info in tensors.values())
    if size != expected:
        raise WorkError(f"{path} is not a whole safetensors file ({size} of {expected} bytes); copy it again")
    return tensors
