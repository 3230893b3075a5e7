"""The teacher on disk: its configuration, and the headers of its weight files. Nothing here reads a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.specs.errors import UsageError, WorkError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
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
    """A Hugging Face checkpoint: `folder` holds its files, `tensors` is empty where only the configuration is there."""

    name: str
    folder: Path
    config: Any
    tensors: Mapping[str, TensorInfo]


def open_checkpoint(model: str, revision: str | None, base: Path, *, weights: bool) -> Checkpoint:
    """A folder (relative to `base`) or a Hub id. With `weights` the weight files are fetched too and must be there.

    UsageError where the model cannot be found or its configuration not be read; WorkError for broken weight files.
    """
    folder = _find(model, revision, base, weights)
    config = _read_config(model, folder)
    tensors = _read_headers(folder)
    if weights and not tensors:
        hint = (
            "convert other formats with save_pretrained" if any(folder.glob("*.bin")) else "copy the weight files there"
        )
        raise WorkError(f"{folder}: no weights in safetensors format; {hint}")
    return Checkpoint(model, folder, config, tensors)


def _find(model: str, revision: str | None, base: Path, weights: bool) -> Path:
    local = (base / model).expanduser()
    if local.is_dir():
        return local.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(
            f"there is no folder {local}; write a folder relative to the spec, or a Hugging Face id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        pass
    except (HfHubHTTPError, OSError, ValueError) as error:
        offline = _cached(model, revision)
        if offline is None:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"{model} is no folder beside the spec and cannot be fetched from the Hugging Face Hub ({reason}); "
                "check the name, log in with `hf auth login`, or download it and write the folder"
            ) from None
        return offline
    offline = _cached(model, revision)
    if offline is None:
        raise UsageError(
            f"{model} is neither a folder beside the spec nor in the local cache, and the Hugging Face Hub cannot be "
            "reached; go online once, or download it elsewhere and write the folder"
        )
    return offline


def _cached(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _read_config(model: str, folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    path = folder / "config.json"
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
        raise UsageError(f"{path} cannot be read by transformers: {str(error).strip().splitlines()[0]}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"{model} is a {config.model_type} model, which transformers does not know as a causal language model; "
            "name a decoder-only text model"
        )
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UsageError(f"{path} has no num_hidden_layers; models of several towers are not supported")
    vars(config).pop("auto_map", None)  # names code that is not used, and that a student's folder would not have
    return config


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = {name: folder / name for name in names}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WorkError(f"{index} is broken ({error}); copy the checkpoint again") from None
        present = [file for file in files.values() if file.is_file()]
        if present and len(present) < len(files):
            missing = next(name for name, file in files.items() if not file.is_file())
            raise WorkError(f"{folder}: {missing} is named in {INDEX} and is not there; copy the checkpoint again")
    else:
        present = [path for path in [folder / SINGLE] if path.is_file()]
    tensors: dict[str, TensorInfo] = {}
    for path in present:
        tensors.update(read_header(path))
    return tensors


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
