"""Tells what lies where a checkpoint of Hugging Face should be, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from minitron.specs.weight_files import INDEX

OF_GGUF = "GGUF files are conversions for llama.cpp: name the Hugging Face folder that they were made from"


def no_folder(path: Path) -> tuple[str, str]:
    """Returns the fault of a path that is not a folder, and what to write."""
    if path.suffix == ".gguf":
        return f"{path} is not a folder", OF_GGUF
    if path.is_file():
        return f"{path} is a file", f"name the folder that holds it and config.json: {path.parent}"
    return f"there is no folder {path}", "write a folder relative to the spec, or a Hugging Face id (owner/name)"


def what_to_do_instead(folder: Path) -> str:
    """Returns what to do about a folder in which nothing says which files are the weights."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return (
            f"{shards[0]} is there, and neither model.safetensors nor {INDEX}, which lists the files of a model: copy the "
            "index too, or save the model again with save_pretrained"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        return "convert other formats with save_pretrained"
    if any(folder.glob("*.gguf")):
        return OF_GGUF
    return "copy the weight files there"
