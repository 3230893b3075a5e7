"""Writes the student as one file for llama.cpp and programs built on it: `minitron export BUILD --gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from minitron.runtime.disk import writing
from minitron.runtime.export.gguf_families import family_of, head_width, rotary, tensors
from minitron.runtime.export.gguf_tokenizer import add_tokenizer
from minitron.runtime.models import open_module
from minitron.specs.atomic import atomic_path
from minitron.specs.builds import CONFIG, MODEL, STUDENT
from minitron.specs.errors import UsageError
from minitron.specs.progress import Progress

WeightType = Literal["f32", "bf16", "q8_0"]

_BLOCK = 32  # weights of a row that share a scale in Q8_0


def export_gguf(
    build: Path, target: Path | None, weight_type: WeightType, *, pre: str | None, progress: Progress
) -> Path:
    """Writes the distilled student of BUILD, or the pruned one where there is no other, and returns the file's path.

    Matrices are stored as `weight_type`, all other tensors in fp32, as llama.cpp requires; a matrix whose rows Q8_0
    cannot divide into blocks stays in bf16. UsageError for models and tokenizers that the format cannot hold, WorkError
    for broken ones.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("export needs the gguf package; run: pip install 'minitron[gguf]'") from None
    folder = next((build / name for name in (MODEL, STUDENT) if (build / name / CONFIG).is_file()), None)
    if folder is None:
        raise UsageError(f"{build} has neither {MODEL}/ nor {STUDENT}/; `minitron compile SPEC -o {build}` makes one")
    target = target or build / f"{folder.name}-{weight_type}.gguf"
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; name a file with -o")
    model = open_module(folder, "auto")
    config = model.config
    family = family_of(config)
    parts = list(tensors(model, config, family))
    _, factors = rotary(config)
    if factors is not None:
        parts.append(("rope_freqs.weight", torch.from_numpy(factors)))
    writer = gguf.GGUFWriter(path=None, arch=family.architecture)
    _describe(writer, build, config, weight_type)
    add_tokenizer(writer, folder, config, pre)
    kinds = {name: _kind(tensor, weight_type) for name, tensor in parts}
    for name, tensor in parts:
        stored = _size(tensor, kinds[name])
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float16), stored, raw_dtype=kinds[name])
    with writing(str(target)), atomic_path(target) as temporary, progress.task("export", len(parts), "tensors") as task:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in parts:
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kinds[name]))
            task.advance()
        writer.close()
    return target


def _describe(writer: Any, build: Path, config: Any, weight_type: WeightType) -> None:
    import gguf

    base, _ = rotary(config)
    width = head_width(config)
    writer.add_name(build.absolute().name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)
    kinds = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(kinds[weight_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _kind(tensor: torch.Tensor, weight_type: WeightType) -> Any:
    """Returns the GGUF type in which a tensor is stored."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2 or weight_type == "f32":
        return kinds.F32
    return kinds.Q8_0 if weight_type == "q8_0" and tensor.shape[-1] % _BLOCK == 0 else kinds.BF16


def _size(tensor: torch.Tensor, kind: Any) -> int:
    """Returns the bytes of a tensor in the file."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return int(tensor.numel() // weights * size)
