"""English prose that this machine has: the docstrings and the descriptions of every installed Python package.

    python examples/smollm2/make_text.py            # writes text/train.jsonl and text/held_out.jsonl

Paragraphs of running text only, each once however often it was copied; code, tables and lists of arguments are left out. About
one package in sixteen is held out, whole. The text is technical and there is not much of it: for a student that is meant to be
used, name better text in spec.yaml. Nothing is downloaded, and nothing of it is committed.
"""

from __future__ import annotations

import argparse
import ast
import email
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELD_OUT_SHARE = 16
LEAST_WORDS = 25  # of a paragraph; shorter ones are headings, lists and remnants
LEAST_DOCUMENT = 400  # characters
SENTENCE = re.compile(r"[.!?:](\s|$)")
# What running text has little of: brackets, operators, underscores, backquotes, bars.
SYMBOLS = re.compile(r"[\[\]{}()<>=_`|\\/*#@$%^&~+]")
MOST_SYMBOLS = 0.02


def prose(text: str) -> list[str]:
    """The paragraphs of running English in a docstring or a description."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip().splitlines()]
        paragraph = " ".join(line for line in lines if line)
        words = paragraph.split()
        if len(words) < LEAST_WORDS or not SENTENCE.search(paragraph) or ">>>" in paragraph:
            continue
        letters = sum(character.isalpha() and character.isascii() for character in paragraph)
        if letters < 0.75 * len(paragraph) or len(SYMBOLS.findall(paragraph)) > MOST_SYMBOLS * len(paragraph):
            continue
        found.append(paragraph)
    return found


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def texts(folder: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Package name and what is written in one file of it, file by file, in an order that is the same on every run."""
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        if "site-packages" not in inside and "test" not in inside and "tests" not in inside:
            yield inside[0].removesuffix(".py"), docstrings(path)
    for path in sorted(folder.glob("*.dist-info/METADATA")):
        message = email.message_from_bytes(path.read_bytes())
        body = message.get_payload()
        yield str(message["Name"]), iter([body if isinstance(body, str) else ""])


def is_held_out(package: str) -> bool:
    """Checks whether a package is kept out of the training text."""
    return hashlib.sha256(package.lower().encode()).digest()[0] % HELD_OUT_SHARE == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "text")
    args = parser.parse_args()
    folders = dict.fromkeys(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))
    seen: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for folder in folders:
        for package, written in texts(folder):
            paragraphs = [one for text in written for one in prose(text) if one not in seen]
            seen.update(paragraphs)
            document = "\n\n".join(dict.fromkeys(paragraphs))
            if len(document) >= LEAST_DOCUMENT:
                parts["held_out" if is_held_out(package) else "train"].append(document)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
        size = sum(map(len, documents)) / 1e6
        print(f"{path}: {len(documents):,} documents, {size:.1f} million characters")


if __name__ == "__main__":
    main()
