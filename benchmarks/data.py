"""Tokenizing training data: tokens a second beside the tokenizer library alone, and memory from 1 MB to 1 GB of one file.

    python benchmarks/data.py speed                                    # the standard library as documents, 256 MB of them
    python benchmarks/data.py speed --text corpus.txt --tokenizer DIR  # lines of a file, the tokenizer of a checkpoint
    python benchmarks/data.py memory                                   # `document: file` of 1, 16, 128 and 1024 MB

Speed: both read the same JSON Lines on the same cores. The library alone encodes batches of documents that are in memory
already, in its own threads, and its tokens are thrown away; ours reads, encodes, frames, checks and writes, before a
training or, as a process at low priority, beside one. They take turns, medians are compared. Memory: the peak of a process
that reads 8 calibration samples of the file, and of one that tokenizes all of it for training, in this process and in its
workers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.runtime.arrivals import TokenizingProcess
from minitron.runtime.tokens import TextEncoder, token_stream
from minitron.specs.data import DataSource
from minitron.specs.documents import content_hash
from minitron.specs.encoding.pool import cores
from minitron.specs.progress import Silent
from minitron.specs.shards.growing import GrowingStream
from minitron.specs.shards.writer import Part
from minitron.specs.stdlib_corpus import stdlib_files

BATCH_CHARACTERS = 1 << 20
VOCABULARY = 16_000
SIZES = (1, 16, 128, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "memory-of"])
    parser.add_argument("--text", type=Path, help="a file whose lines are documents")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer; one is trained without it")
    parser.add_argument("--megabytes", type=int, help="of documents (speed), or the largest file (memory)")
    parser.add_argument("--tokenized", type=int, default=128, help="megabytes up to which all of a file is tokenized")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    if options.what == "memory-of":
        return memory_of(options.rest[0], Path(options.rest[1]), Path(options.rest[2]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = options.tokenizer or trained(folder / "tokenizer")
        if options.what == "speed":
            speed(folder, tokenizer, options.text, (options.megabytes or 256) << 20, options.rounds)
        else:
            memory(folder, tokenizer, options.megabytes or SIZES[-1], options.tokenized)


def trained(folder: Path) -> Path:
    """A byte-level BPE as GPT-2's, of the standard library's own words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(file) for file in stdlib_files("train")[:200]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def documents(text: Path | None, wanted: int) -> Iterator[str]:
    """At least `wanted` characters; what there is comes again until there are enough."""
    size = 0
    while True:
        if text is None:
            found = [file.read_text(encoding="utf-8") for file in stdlib_files("train")]
        else:
            found = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        for document in found:
            yield document
            size += len(document)
            if size >= wanted:
                return


def speed(folder: Path, tokenizer: Path, text: Path | None, wanted: int, rounds: int) -> None:
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents(text, wanted))
    encoder, source = TextEncoder.load(tokenizer), DataSource(jsonl=(str(corpus),))
    content = content_hash(source)
    batches = in_memory(text, wanted)
    alone, ours, aside, tokens = [], [], [], 0
    for number in range(rounds):
        start = clocks()
        tokens = library_alone(tokenizer, batches)
        alone.append([tokens / seconds for seconds in since(start)])
        start = clocks()
        stream = token_stream(source, content, encoder, folder / f"cache-{number}", Silent())
        ours.append([len(stream) / seconds for seconds in since(start)])
        start = clocks()
        count = beside(source, encoder, folder / f"beside-{number}")
        aside.append([count / seconds for seconds in since(start)])
    print(f"{tokens} tokens of {corpus.stat().st_size / 1e6:.0f} MB, {cores()} cores, median of {rounds}")
    for place, clock in enumerate(("second", "second of CPU time")):
        rates = [statistics.median(one[place] for one in measured) for measured in (alone, ours, aside)]
        print(
            f"tokens a {clock}: library alone {rates[0]:.0f}, minitron {rates[1]:.0f}, ratio {rates[1] / rates[0]:.2f}; "
            f"beside a training {rates[2]:.0f}, ratio {rates[2] / rates[0]:.2f}"
        )


def beside(source: DataSource, encoder: TextEncoder, folder: Path) -> int:
    """Tokenizes as a training does that begins with the first shards, without the training."""
    process, stream = TokenizingProcess([[Part(source, folder)]], encoder), GrowingStream(folder)
    while not process.ended():
        time.sleep(0.05)
    process.close()
    stream.poll()
    assert stream.ended, process.failure()
    return len(stream)


def clocks() -> list[float]:
    """Wall clock, and CPU time of this process and of those that it waited for."""
    times = os.times()
    return [time.perf_counter(), times.user + times.system + times.children_user + times.children_system]


def since(start: list[float]) -> list[float]:
    return [now - before for now, before in zip(clocks(), start, strict=True)]


def in_memory(text: Path | None, wanted: int) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for document in documents(text, wanted):
        batches[-1].append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            batches.append([])
            size = 0
    return batches


def library_alone(tokenizer: Path, batches: list[list[str]]) -> int:
    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return sum(len(one) for batch in batches for one in library.encode_batch_fast(batch, add_special_tokens=False))


def memory(folder: Path, tokenizer: Path, largest: int, tokenized: int) -> None:
    print("memory beyond that of the loaded libraries")
    print("one file, `document: file`      calibration, 8 samples     training, all of it")
    for size in (one for one in SIZES if one <= largest):
        file = folder / f"{size}.txt"
        with file.open("w", encoding="utf-8") as handle:
            handle.writelines(documents(None, size << 20))
        peaks = []
        for what in ("calibration", "training")[: 1 + (size <= tokenized)]:
            command = [sys.executable, __file__, "memory-of", what, str(tokenizer), str(file)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(json.loads(done.stdout))
        shown = [f"{size:6d} MB                  {peaks[0]['own']:12.0f} MiB"]
        for training in peaks[1:]:
            shown.append(f"{training['own']:8.0f} MiB + {training['worker']:.0f} MiB in the largest worker")
        print("         ".join(shown), flush=True)
        file.unlink()


def memory_of(what: str, tokenizer: Path, file: Path) -> None:
    """Peak memory in MiB, beyond what the libraries took before."""
    source = DataSource(text=(str(file),))
    own = AutoTokenizer.from_pretrained(tokenizer)
    encoder = TextEncoder.load(tokenizer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "calibration":
        calibration_samples(source, own, len(own), SampleConfig(8, 512))
    else:
        with tempfile.TemporaryDirectory(dir=file.parent) as cache:
            token_stream(source, content_hash(source), encoder, Path(cache), Silent())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"own": (after - before) / 1024, "worker": worker / 1024}))


if __name__ == "__main__":
    main()
