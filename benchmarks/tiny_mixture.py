"""Trains a small mixture of experts: the teacher of the experts' cases of benchmarks/recovery.py.

    python benchmarks/tiny_mixture.py ../shared/data/stories260K DOCUMENTS.jsonl /tmp/mixture

DOCUMENTS.jsonl is what benchmarks/recovery.py lets that teacher write (documents.jsonl in its folder). The mixture learns the
teacher's distribution of next tokens on it: three layers, hidden 64, eight experts of 96 neurons of which a token is sent to
two, and a load balance over all layers together, as transformers has it: single layers come out unbalanced.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

LENGTH, BATCH, RATE, BALANCE = 256, 8, 4e-3, 0.02
EXPERTS, PICKED = 8, 2


def token_rows(documents: Path, teacher: Path) -> torch.Tensor:
    """The documents one behind the other, cut into rows of LENGTH tokens."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = documents.read_text(encoding="utf-8").splitlines()
    ids = [one for line in lines for one in tokenizer(json.loads(line)["text"])["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def mixture(teacher: torch.nn.Module) -> MixtralForCausalLM:
    """The untrained model, with the teacher's embedding."""
    config = teacher.config
    shape = MixtralConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=PICKED,
        tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = MixtralForCausalLM(shape)
    model.model.embed_tokens.weight.data.copy_(teacher.get_input_embeddings().weight.data)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("documents", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=4_500_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher).eval()
    rows, model = token_rows(args.documents, args.teacher), mixture(teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    steps = args.tokens // (BATCH * LENGTH)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(1 + steps * BATCH // len(rows))])
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)
        ids = rows[order[step * BATCH : (step + 1) * BATCH]]
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        found = model(input_ids=ids, use_cache=False, output_router_logits=True)
        divergence = (wanted.exp() * (wanted - found.logits.log_softmax(-1))).sum(-1).mean()
        balance = load_balancing_loss_func(found.router_logits, EXPERTS, PICKED)
        (divergence + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: divergence {float(divergence):.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.teacher).save_pretrained(args.output)


if __name__ == "__main__":
    main()
