"""Where a student can run: each answer against the rule itself, by counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minitron.compiler.estimate.deployment import deployment, head_width, k_quants, tensor_parallel
from tests.models import tiny_config


def built(**changes: Any) -> tuple[Any, torch.nn.Module, dict[str, int]]:
    config = tiny_config("llama", **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return config, model, {name: getattr(config, name) for name in names}


@given(heads=st.integers(1, 64), groups=st.integers(1, 16), channels=st.integers(1, 300))
def test_layers_are_split_where_each_device_gets_as_much(heads: int, groups: int, channels: int) -> None:
    widths = {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": channels}
    found = tensor_parallel(widths)
    sizes = [int(size) for size in found.value.split(" ")[0:-1] for size in [size.rstrip(",")]]
    for size in (2, 4, 8):
        even = heads % size == 0 and channels % size == 0 and (groups % size == 0 or size % groups == 0)
        assert (size in sizes) == even
    assert found.ok == (sizes == [1, 2, 4, 8])
    if not found.ok:
        assert found.reason and found.nearest


def test_the_nearest_widths_do() -> None:
    widths = {"num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 11_500}
    found = tensor_parallel(widths)
    assert (found.value, found.reason) == ("1, 2, 4 devices", "intermediate_size 11500: not divisible by 8")
    assert found.nearest == "intermediate_size: 11504"
    assert tensor_parallel(widths | {"intermediate_size": 11_504}).ok


def test_rows_of_256() -> None:
    _, model, widths = built(hidden_size=256, intermediate_size=512, head_dim=64)
    assert k_quants(model, widths).ok
    _, model, widths = built(hidden_size=256, intermediate_size=320, head_dim=64)
    found = k_quants(model, widths)
    assert (found.ok, found.value) == (False, "20 of 23 matrices")
    assert found.reason == "rows of 320 (model.layers.0.mlp.down_proj.weight, 3 in all) take blocks of 32"
    assert found.nearest == "intermediate_size: 256"
    _, model, widths = built(hidden_size=256, intermediate_size=300, head_dim=64)
    assert "take no blocks at all" in str(k_quants(model, widths).reason)


@pytest.mark.parametrize(("hidden", "ok"), [(32, True), (48, False)])
def test_a_head_that_is_no_share_of_the_hidden_width(hidden: int, ok: bool) -> None:
    config, _, widths = built(hidden_size=hidden, head_dim=8)
    found = head_width(config, widths)
    assert found is not None and found.ok == ok
    assert ok or found.reason == (
        "hidden_size / num_attention_heads is 12: a loader has to read the key head_dim, and old ones do not"
    )
    assert head_width(config, {"hidden_size": hidden}) is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_document(tied: bool) -> None:
    found = deployment(*built(tie_word_embeddings=tied))
    assert [one["name"] for one in found] == [
        "tensor parallelism", "K-quants (rows of 256)", "head width", "embeddings",
    ]  # fmt: skip
    assert found[-1]["value"] == ("tied" if tied else "untied")
    assert all(set(one) == {"name", "ok", "value", "reason", "nearest"} for one in found)
