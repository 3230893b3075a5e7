"""Refuses checkpoints that cannot be a teacher: quantised weights, and layers with configurations of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron.specs.builds import CONFIG
from minitron.specs.errors import UsageError
from minitron.specs.weight_files import TensorInfo

# Keys of config.json, and files beside it, by which tools say that weights are quantised.
QUANTISED_KEYS = ("quantization_config", "compression_config", "quant_config", "quantization")
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
# Endings of tensors that scale or unpack others (GPTQ, AWQ, bitsandbytes, ModelOpt, compressed-tensors, DeepSeek, NVFP4).
SCALES = (
    "_scale", "_scale_inv", "_scale_2", "_scales", "_zero_point", "_packed", ".qweight", ".qzeros", ".scales", ".g_idx",
    ".SCB", ".absmax", ".quant_map", ".nested_absmax", ".weight_format",
)  # fmt: skip
# Headers of 8 bits that are whole numbers without a scale; those of fewer bits are never whole weights.
FLOATING = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
REMEDY = "name the checkpoint that they were made from, in bfloat16 or float32"


def check_not_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UsageError where the configuration or a file beside it says that the weights are quantised."""
    key = next((path for path, value in _parts(config) if path.rpartition(".")[2] in QUANTISED_KEYS and value), None)
    if key is not None:
        raise UsageError(f"{folder / CONFIG}: the weights are quantized ({key}); {REMEDY}")
    name = next((name for name in QUANTISED_FILES if (folder / name).is_file()), None)
    if name is not None:
        raise UsageError(
            f"{folder}: the weights are quantized ({name} lies there); {REMEDY}, or remove that file if they are not"
        )


def check_tensors_not_quantised(
    folder: Path, tensors: Mapping[str, TensorInfo], floating: Collection[str], known: Collection[str]
) -> None:
    """Raises UsageError where weight files hold numbers that only a scale makes weights of. `floating` are the model's
    tensors of floating point, `known` all that it has. Eight-bit floats without a scale are weights as they are."""
    for name, info in tensors.items():
        if name not in known and _scaled(name, tensors):
            raise UsageError(
                f"{folder}: the weights are quantized: {name} in {info.file.name} scales another tensor; {REMEDY}"
            )
    for name, info in tensors.items():
        if name in floating and info.dtype not in FLOATING:
            raise UsageError(
                f"{folder}: {name} in {info.file.name} is held as {info.dtype}, and the model's is of floating point; {REMEDY}"
            )


def _scaled(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Checks whether a tensor scales or unpacks another tensor of the files."""
    ending = next((ending for ending in SCALES if name.endswith(ending)), None)
    if ending is None:
        return False
    base = name.removesuffix(ending)
    packed = ending.startswith(".") or ending in ("_packed", "_zero_point")
    parent = name.rpartition(".")[0]
    # `x.weight_scale` beside `x.weight`, `x.input_scale` beside any weight of x; packed weights have no other name.
    return packed or base in tensors or f"{base}.weight" in tensors or f"{parent}.weight" in tensors


def _parts(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        path = f"{above}.{key}" if above else key
        yield path, value
        if isinstance(value, dict):
            yield from _parts(value, path)


def check_one_for_all_layers(path: Path, config: Any) -> None:
    """Raises UsageError where the configuration gives keys layer by layer: a student's could not say which layers are
    left."""
    if not getattr(config, "is_heterogeneous", False):
        return
    first, *others = (layer.to_dict() for layer in config.per_layer_config)
    differing = {key for layer in others for key in layer if layer[key] != first.get(key)}
    raise UsageError(
        f"{path} gives {', '.join(sorted(differing)) or 'keys'} of a {config.model_type} model layer by layer "
        "(per_layer_config), which cannot be narrowed yet; name a model whose layers have one configuration"
    )
