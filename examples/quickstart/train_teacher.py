"""Trains the small teacher that the quickstart prunes, on the source of the Python standard library.

    python examples/quickstart/train_teacher.py --minutes 65

It trains for the given wall time whatever the machine's speed: warm-up, constant rate and decay follow the clock.
Killed and started again it goes on from its last checkpoint in `--work`. What is evaluated and saved in the end are
the weights rounded to bfloat16. The quickstart does not need any of this: the result is committed in `teacher/`.

    python examples/quickstart/train_teacher.py --minutes 80 --begin examples/quickstart/teacher --seed 1 --out /tmp/next

begins another round, with its own warm-up and decay, from what an earlier one has written; the card then tells of both.

One process a core, each with one thread, gradients averaged once a step: for matrices this small that is half as fast
again as one process with all threads, and does not collapse when something else wants a core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.distributed as dist
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from minitron.specs.stdlib_corpus import stdlib_files

HERE = Path(__file__).resolve().parent
BOS, EOS = "<s>", "</s>"
# One chunk of text per alternative; merges never cross chunks. Line breaks keep the indentation that follows them.
CHUNKS = r"[\r\n]+[ \t]*| ?[^\W\d]+| ?\d{1,2}| ?[^\s\w]+|\s+"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the teacher becomes, besides the machine and the minutes."""

    vocab_size: int = 1280
    hidden_size: int = 160
    intermediate_size: int = 448
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 24  # not hidden_size / num_attention_heads: the compiler must read the graph, not assume
    sequence_length: int = 256
    batch_size: int = 16  # sequences
    lr: float = 3e-3
    warmup: float = 0.02  # share of the time
    decay: float = 0.4  # share of the time, at the end, linear to zero
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad_norm: float = 1.0
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text comes back as it was, and `encode` puts BOS first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CHUNKS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents one after the other, [tokens], int64: BOS document EOS BOS document EOS ..."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(recipe: Recipe) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.sequence_length,
        sliding_window=None,
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        use_cache=False,
    )
    model = MistralForCausalLM(config)
    model.config._attn_implementation = "eager"  # at 256 tokens two matrix products beat the fused kernel on a CPU
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what writes the residual stream: GPT-2's scaling
            weight.data /= math.sqrt(2 * recipe.num_hidden_layers)
    return model


class Windows:
    """Training sequences by index: a pure function of (seed, index), so that a resumed run goes on as if never stopped.

    Each epoch cuts the stream at another offset and shuffles the windows. Every other window begins with BOS in
    place of its first token: the teacher knows both a text cut anywhere and a chunk with BOS before it.
    """

    def __init__(self, stream: Tensor, length: int, bos: int, seed: int) -> None:
        self.stream, self.length, self.bos, self.seed = stream, length, bos, seed
        self.per_epoch = (len(stream) - length) // length
        self.epoch = -1

    def _open(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.offset = int(torch.randint(self.length, (1,), generator=generator))
        self.order = torch.randperm(self.per_epoch, generator=generator).tolist()
        self.epoch = epoch

    def batch(self, first: int, count: int) -> Tensor:
        """Windows number `first` to `first + count - 1`, [count, length]."""
        rows = []
        for index in range(first, first + count):
            epoch, place = divmod(index, self.per_epoch)
            if epoch != self.epoch:
                self._open(epoch)
            start = self.offset + self.order[place] * self.length
            row = self.stream[start : start + self.length].clone()
            if (place + epoch) % 2:
                row[0] = self.bos
            rows.append(row)
        return torch.stack(rows)


def lr_at(share: float, recipe: Recipe) -> float:
    """Warm-up, constant, linear decay to zero, over the `share` of the time that has passed."""
    if share < recipe.warmup:
        return recipe.lr * max(share, 1e-3) / recipe.warmup
    return recipe.lr * min(1.0, max(0.0, (1.0 - share) / recipe.decay))


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int
) -> dict[str, float]:
    """Each document cut into chunks of `length - 1` tokens with BOS before each; every token of it is predicted once.

    Returns `loss` (nats a token), `bits_per_byte`, `tokens`, `bytes`.
    """
    model.eval()
    total, tokens = 0.0, 0
    chunks = []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        chunks += [[tokenizer.bos_token_id, *ids[i : i + length - 1]] for i in range(0, len(ids), length - 1)]
    chunks.sort(key=len)
    for first in range(0, len(chunks), 32):
        rows = [torch.tensor(chunk) for chunk in chunks[first : first + 32]]
        ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        logits = model(input_ids=ids_BS.clamp(min=0)).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum").item()
        tokens += int((ids_BS[:, 1:] >= 0).sum())
    model.train()
    size = sum(len(text.encode()) for text in texts)
    return {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size, "tokens": tokens, "bytes": size}


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def earlier_rounds(begin: Path) -> dict[str, str]:
    """Returns the rows of the next card that say, from the card of the teacher in `begin`, how that was trained."""
    card = (begin / "README.md").read_text(encoding="utf-8")
    cells = [line.strip("|").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    told = {cell[0].strip(): cell[1].strip() for cell in cells if len(cell) == 2}
    rounds = {key: value for key, value in told.items() if key.startswith("round ")}
    last = "; ".join(told[key] for key in ("training tokens seen", "steps", "training time"))
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    settings = f"lr {recipe['lr']}, seed {recipe['seed']}"
    loss = told["held-out loss (nats a token)"]
    return {**rounds, f"round {len(rounds) + 1}": f"{last}; {settings}; held-out loss {loss}"}


def model_card(recipe: Recipe, figures: dict[str, str]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    return f"""---
library_name: transformers
license: apache-2.0
---
# The quickstart's teacher

A Mistral-shaped causal language model of Python source, small enough to live in a repository: grouped-query attention,
`head_dim` ({recipe.head_dim}) that is not `hidden_size / num_attention_heads`
({recipe.hidden_size} / {recipe.num_attention_heads}), untied embeddings. Trained from scratch by
`examples/quickstart/train_teacher.py` on the Python standard library (`python-stdlib:train`); the held-out modules
(`python-stdlib:held_out`: among them functools, threading, contextlib, doctest, zipfile, ssl) were never trained on.
It exists to be pruned and distilled in minutes; it is of no other use.

| figure | value |
|---|---|
{rows}

Held-out loss: each file cut into chunks of {recipe.sequence_length - 1} tokens, BOS before each, every token predicted
once, weights rounded to bfloat16 and computed in float32. The text that it learnt from is under the PSF licence.
The settings, those of the last round where there were several:

```json
{json.dumps(asdict(recipe), indent=2)}
```
"""


def finish(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out_texts: list[str],
    recipe: Recipe,
    facts: dict[str, str],
    out: Path,
) -> None:
    """Rounds to bfloat16, measures what that gives, and writes a checkpoint as transformers reads it with its card."""
    model.to(torch.bfloat16)
    result = held_out_loss(model.float(), held_out_texts, tokenizer, recipe.sequence_length)
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "held-out loss (nats a token)": f"{result['loss']:.4f}",
        "held-out perplexity": f"{math.exp(result['loss']):.2f}",
        "held-out bits per byte": f"{result['bits_per_byte']:.4f}",
        "held-out tokens (bytes)": f"{result['tokens']:,} ({result['bytes']:,})",
        **facts,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
    }
    model.config.use_cache = model.generation_config.use_cache = True  # training went without
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(model_card(recipe, facts), encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))


def average(model: torch.nn.Module, figures: list[float]) -> list[float]:
    """Averages all gradients, and `figures` with them, over the processes: one exchange a step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(figures)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, rest = flat.split([*(g.numel() for g in gradients), len(figures)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return rest.tolist()


def train(rank: int, processes: int, port: int, args: argparse.Namespace, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    say = print if rank == 0 else (lambda *a, **k: None)

    train_texts = [path.read_text(encoding="utf-8") for path in stdlib_files("train")]
    held_out_texts = [path.read_text(encoding="utf-8") for path in stdlib_files("held_out")]
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size)
    assert all(tokenizer.decode(tokenizer(t).input_ids, skip_special_tokens=True) == t for t in held_out_texts)
    windows = Windows(encode(train_texts, tokenizer), recipe.sequence_length, tokenizer.bos_token_id, recipe.seed)
    model = build_model(recipe)
    if args.begin is not None:
        model.load_state_dict(MistralForCausalLM.from_pretrained(args.begin, dtype=torch.float32).state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), betas=recipe.betas, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{parameters:,} parameters, {parameters * 2 / 1e6:.2f} MB in bf16; {len(windows.stream):,} training tokens of "
        f"{sum(len(t.encode()) for t in train_texts):,} bytes; {processes} processes",
        flush=True,
    )

    step, spent = 0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        say(f"resumed at step {step} after {spent / 60:.1f} minutes", flush=True)

    budget, share = args.minutes * 60, recipe.batch_size // processes
    last = time.monotonic()
    logged_at, saved_at, logged_step, running = spent, spent, step, 0.0
    while spent < budget:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(spent / budget, recipe)
        ids_BS = windows.batch(step * recipe.batch_size + rank * share, share)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids_BS).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids_BS[:, 1:].flatten())
        loss.backward()
        now = time.monotonic()
        # The clock is averaged too: every process takes the same rate and stops at the same step.
        loss_mean, spent = average(model, [loss.item(), spent + now - last])
        last = now
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step, running = step + 1, running + loss_mean
        if spent - logged_at >= 20:
            steps = step - logged_step
            rate = steps * recipe.batch_size * recipe.sequence_length / (spent - logged_at)
            figures = f"step {step:6d}  loss {running / steps:.4f}  {rate:,.0f} tokens/s"
            say(f"{spent / 60:5.1f} min  {figures}", flush=True)
            logged_at, logged_step, running = spent, step, 0.0
        if spent - saved_at >= 120:
            saved_at = spent
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)

    dist.destroy_process_group()
    if rank == 0:
        tokens = step * recipe.batch_size * recipe.sequence_length
        seen = f"{tokens:,}, {tokens / len(windows.stream):.1f} epochs of {len(windows.stream):,}"
        facts = {
            **({} if args.begin is None else earlier_rounds(args.begin)),
            "training tokens seen": seen if args.begin is None else f"{seen}, in the last round",
            "steps": f"{step:,} of {recipe.batch_size} x {recipe.sequence_length} tokens",
            "training time": f"{spent / 60:.1f} minutes, {processes} processes on {os.cpu_count()} CPU cores",
        }
        finish(model, tokenizer, held_out_texts, recipe, facts, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=65.0, help="wall time of training, evaluation not counted")
    parser.add_argument("--work", type=Path, default=Path("/tmp/minitron-quickstart-teacher"), help="checkpoints")
    parser.add_argument("--begin", type=Path, help="a teacher of an earlier round, to go on from its weights")
    parser.add_argument("--out", type=Path, default=HERE / "teacher")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    for key in ("lr", "batch_size", "seed"):
        parser.add_argument(f"--{key}", type=type(getattr(Recipe(), key)), default=getattr(Recipe(), key))
    args = parser.parse_args()
    recipe = Recipe(**{key: value for key, value in vars(args).items() if key in asdict(Recipe())})
    if recipe.batch_size % args.processes:
        parser.error("--batch_size must be a multiple of --processes")
    args.work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (args.processes, port, args, recipe), nprocs=args.processes)


if __name__ == "__main__":
    main()
