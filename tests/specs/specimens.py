"""Specs that the tests start from."""

from __future__ import annotations

# The example of the language's contract, word for word apart from the comments.
WHOLE = """\
apiVersion: minitron/v1
kind: Compression
name: mistral-nemo-minitron-8b

teacher:
  model: mistralai/Mistral-Nemo-Base-2407
  revision: main
  dtype: bfloat16

student:
  hidden_size: 4096
  intermediate_size: 11520

importance:
  data: {text: [corpus/*.txt], samples: 1024, sequence_length: 8192}
  width: {batch: l2, sequence: mean}
  depth: {metric: block_influence, contiguous: false}
  selection: scores
  hidden_basis: channels

recovery:
  refit: none
  merge_heads: false

search:
  budget: {parameters: 8.0B, tolerance: 5%}
  candidates: 16
  rank: {metric: kl, tokens: 1.8B, rungs: 3}

teacher_correction:
  tokens: 127B
  optimizer: {lr: 2e-5, min_lr: 4.5e-7, warmup_steps: 120}

distill:
  data: {dataset: org/name, split: train, text_field: text}
  tokens: 380B
  teacher_logits: online
  sequence_length: 8192
  global_batch_size: 768
  optimizer: {name: adamw, lr: 1e-4, min_lr: 4.5e-7, warmup_steps: 60, schedule: cosine, betas: [0.9, 0.95], weight_decay: 0.1}
  loss:
    logits: {divergence: forward_kl, temperature: 1.0, weight: 1.0}
    hidden_states: null
    cross_entropy: 0.0
  seed: 0

evaluate:
  suite: minitron-9
  held_out: {text: [corpus/valid.txt]}
"""

# The shortest spec there is: which layers go is said outright, so no scores and no data are needed.
SHORTEST = """\
teacher: {model: org/teacher}
student: {layers: {drop: [2]}}
"""

# A search, and text to judge its candidates on; stands below SMALL.
SEARCH = """\
search: {budget: {memory: 1GiB}}
evaluate: {held_out: {text: [b.txt]}}
"""

# Everything that a distillation needs, and no more.
SMALL = """\
name: small
teacher: {model: org/teacher}
student: {hidden_size: 48}
importance: {data: {text: [a.txt]}}
distill: {data: {text: [a.txt]}, tokens: 1B}
"""
