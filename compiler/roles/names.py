"""The names of all axes, as specs, plans and configurations spell them."""

from __future__ import annotations

from minitron.specs.blocks.student import DEPTH

HIDDEN = "hidden_size"
HEADS = "num_attention_heads"
GROUPS = "num_key_value_heads"
HEAD_DIM = "head_dim"
LAYERS = DEPTH

INTERMEDIATE = "intermediate_size"
MOE_INTERMEDIATE = "moe_intermediate_size"
SHARED = "shared_expert_intermediate_size"
FEED_FORWARD = (INTERMEDIATE, MOE_INTERMEDIATE, SHARED)
NUM_EXPERTS = "num_experts"

SCAN_HEADS = "mamba_num_heads"
SCAN_HEAD_DIM = "mamba_head_dim"
CONVOLVED = "convolved_channels"

# Counted, not measured: a share of these is rounded to a whole number and not to a multiple.
COUNTS = {HEADS, GROUPS, LAYERS, NUM_EXPERTS, SCAN_HEADS}
