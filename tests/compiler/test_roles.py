"""Roles: the axes that a user names, found by where they stand in the graph and not by the name of the model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minitron.compiler.axes.analysis import analyse
from minitron.compiler.axes.dims import Atom
from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from minitron.compiler.capture import capture as capture_module
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS
from minitron.compiler.roles.roles import find_roles, is_stack
from minitron.compiler.roles.widths import leaves_of
from minitron.compiler.student.status import status_of
from tests.compiler.families import EVERY, analysed, config, describe
from tests.models import FAMILIES, random_model

IDS = torch.arange(3, 27).reshape(2, 12)
DENSE = [family for family in FAMILIES if family != "mixtral"]


def widths(model: AnalysedTeacher) -> dict[str, int]:
    return dict(model.widths)


def status(model: AnalysedTeacher, axis: str) -> tuple[str, str]:
    return status_of(axis, model)


class TestNames:
    @pytest.mark.parametrize("family", DENSE)
    def test_a_dense_model_has_the_widths_of_its_configuration(self, family: str) -> None:
        model = analysed(family)
        said = model.captured.config
        groups = getattr(said, GROUPS, None) or said.num_attention_heads
        head = getattr(said, HEAD_DIM, None) or said.hidden_size // said.num_attention_heads
        assert widths(model) == {
            HIDDEN: 32, "intermediate_size": 40, HEADS: 4, GROUPS: groups, HEAD_DIM: head, LAYERS: 2,
        }  # fmt: skip
        assert not model.roles.refusals and not model.table.unknown

    @pytest.mark.parametrize("family", DENSE)
    def test_every_layer_has_its_own_axes(self, family: str) -> None:
        model = analysed(family)
        for axis in ("intermediate_size", HEADS, GROUPS):
            assert len(set(leaves_of(axis, model.roles, model.table))) == 2
        assert sorted(model.roles.heads) == sorted(model.roles.widths["intermediate_size"]) == [0, 1]

    @pytest.mark.parametrize("family", DENSE)
    def test_readers_are_the_projections_back_into_the_residual_stream(self, family: str) -> None:
        """What they read scores an axis."""
        model = analysed(family)
        for layer in (0, 1):
            (heads,) = model.roles.heads[layer].readers
            (width,) = model.roles.widths["intermediate_size"][layer].readers
            for reader in (heads, width):
                assert reader.weight is not None and f".{layer}." in reader.weight
                assert model.table.space.describe(model.table.parameters[reader.weight][0]) == "32"
            assert heads.weight is not None and "att" in heads.weight
            assert width.weight is not None and "mlp" in width.weight

    def test_hidden_is_read_by_every_projection_and_by_the_head(self) -> None:
        names = {reader.weight for reader in analysed("llama").roles.hidden.readers}
        layer = {f"self_attn.{p}_proj.weight" for p in "qkv"} | {f"mlp.{p}_proj.weight" for p in ("gate", "up")}
        assert names == {f"model.layers.{i}.{name}" for i in (0, 1) for name in layer} | {"lm_head.weight"}

    def test_the_vocabulary_is_no_axis_to_narrow(self) -> None:
        model = analysed("qwen3")
        assert describe(model, "model.embed_tokens.weight") == ["96!", "32"]
        assert "vocab_size" not in widths(model)

    def test_fused_projections_are_read_by_their_parts(self) -> None:
        model = analysed("phi3")
        assert (
            describe(model, "model.layers.0.self_attn.qkv_proj.weight")[0]
            == "(2 x 2 x (4! + 4!) + 2 x (4! + 4!) + 2 x 8)"
        )
        gate, up = model.table.space.leaves(model.table.parameters["model.layers.0.mlp.gate_up_proj.weight"][0])
        assert gate is up is model.roles.widths["intermediate_size"][0].leaf

    def test_interleaved_projections_are_groups_of_queries_keys_and_values(self) -> None:
        model = analysed("gpt_neox", hidden_size=64)
        fused, hidden = describe(model, "gpt_neox.layers.0.attention.query_key_value.weight")
        rotated = r"\(\((\d)! \+ \1!\) \+ (\d+)\)"
        found = re.fullmatch(rf"4 x \({rotated} \+ \(\(\1! \+ \1!\) \+ \2\) \+ 16\)", fused)
        assert found is not None and 2 * int(found[1]) + int(found[2]) == 16 and hidden == "64"

    def test_a_conv1d_of_gpt2_is_a_matrix_the_other_way_round(self) -> None:
        model = analysed("gpt2")
        assert widths(model) == {HIDDEN: 32, "intermediate_size": 40, HEADS: 4, GROUPS: 4, HEAD_DIM: 8, LAYERS: 2}
        assert describe(model, "transformer.h.0.attn.c_attn.weight") == ["32", "(4 x 8 + 4 x 8 + 4 x 8)"]


class TestHeads:
    @pytest.mark.parametrize(
        ("family", "groups", "repeats"),
        [("llama", 2, 2), ("llama", 1, 4), ("llama", 4, 1), ("phi3", 4, 1), ("gemma2", 1, 4)],
    )
    def test_groups_and_repeats(self, family: str, groups: int, repeats: int) -> None:
        """Many query heads to a group, one group for all, one query head to each."""
        model = analysed(family, num_key_value_heads=groups)
        for site in model.roles.heads.values():
            assert (site.groups, site.repeats) == (groups, repeats)
            assert (site.group is None) == (groups == 1) and (site.repeat is None) == (repeats == 1)
        assert widths(model)[HEADS] == 4 and widths(model)[GROUPS] == groups

    def test_with_one_group_only_its_query_heads_can_go(self) -> None:
        model = analysed("llama", num_key_value_heads=1)
        assert status(model, HEADS)[0] == "exact"
        assert status(model, GROUPS) == ("refused", "the graph of llama shows no such axis")

    def test_with_one_query_head_a_group_both_names_mean_the_same_leaves(self) -> None:
        model = analysed("llama", num_key_value_heads=4)
        assert leaves_of(HEADS, model.roles, model.table) == leaves_of(GROUPS, model.roles, model.table)

    def test_a_head_may_be_wider_than_hidden_over_heads(self) -> None:
        model = analysed("mistral")
        assert widths(model)[HEAD_DIM] == 12
        assert describe(model, "model.layers.0.self_attn.o_proj.weight") == ["32", "2 x 2 x 12"]

    def test_norms_over_all_heads_leave_them_free_and_noted(self) -> None:
        model = analysed("olmo2")
        assert {note.kind for leaf in leaves_of(HEADS, model.roles, model.table) for note in leaf.notes} == {"mean"}

    def test_slopes_that_count_the_heads_off_hold_them(self) -> None:
        kind, reason = status(analysed("bloom"), HEADS)
        assert kind == "refused" and reason.startswith("counted off by arange")


class TestHeadDim:
    @pytest.mark.parametrize("family", [family for family in DENSE if family != "gpt_neox"])
    def test_rotary_tables_hold_queries_and_keys(self, family: str) -> None:
        """The halves of a head are rotated into each other, by a table that is computed when the model is loaded."""
        kind, reason = status(analysed(family), HEAD_DIM)
        assert kind == "refused"
        assert reason == "fixed by the rotary embeddings (model.rotary_emb.inv_freq)"

    def test_values_are_free_but_one_key_says_both_widths(self) -> None:
        model = analysed("gpt2")
        assert status(model, HEAD_DIM)[0] == "refused"
        value = next(iter(model.table.space.leaves(model.roles.heads[0].value)))
        assert not value.pins


class TestStatus:
    @pytest.mark.parametrize("family", [family for family in DENSE if family != "gpt_neox"])
    def test_hidden_under_rms_norm_is_exact_once_the_mean_square_is_of_what_is_left(self, family: str) -> None:
        assert status(analysed(family), HIDDEN) == (
            "exact", "identical to the masked teacher, with norms over the kept channels",
        )  # fmt: skip

    @pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
    def test_hidden_under_layer_norm_is_approximate(self, family: str) -> None:
        kind, reason = status(analysed(family), HIDDEN)
        assert kind == "approximate" and reason.startswith("layer_norm is taken over the kept channels")

    @pytest.mark.parametrize("axis", ["intermediate_size", HEADS, GROUPS])
    @pytest.mark.parametrize("family", DENSE)
    def test_feed_forward_and_heads_are_exact(self, family: str, axis: str) -> None:
        assert status(analysed(family), axis) == ("exact", "identical to the masked teacher")


class TestExperts:
    def test_mixtral_calls_the_width_of_its_experts_intermediate_size(self) -> None:
        model = analysed("mixtral")
        assert widths(model)["intermediate_size"] == 40 and widths(model)["num_experts"] == 4
        assert describe(model, "model.layers.0.mlp.experts.gate_up_proj") == ["4", "(40 + 40)", "32"]

    def test_experts_that_are_gone_are_those_without_weight(self) -> None:
        kind, reason = status(analysed("mixtral"), "num_experts")
        assert kind == "exact" and "the router gives no weight to experts that are gone" in reason

    def test_a_mixture_is_read_off_around_its_last_product(self) -> None:
        model = analysed("mixtral")
        mixture = model.roles.mixtures[1]
        assert [atom.size.coefficient for atom in mixture.experts] == [4]
        assert (mixture.picked, mixture.groups, mixture.least) == (2, 1, 2)
        assert model.captured.layer_of(mixture.contribution) == 1
        width = model.roles.widths["intermediate_size"][1]
        assert width.parents == mixture.experts, "each expert may keep channels of its own"

    def test_experts_are_picked_by_the_token_in_a_graph_of_one_length_too(self) -> None:
        """Its rows are sorted all together, and are so many."""
        any_length = analysed("mixtral").captured
        model, graph_module = capture_module._export(any_length.config, torch.float32, any_length.attention, 8)
        captured = replace(any_length, model=model, graph_module=graph_module)
        mixture = find_roles(captured, analyse(captured)).mixtures[1]
        assert captured.length == 8 and any_length.length is None and mixture.picked == 2

    def test_dense_layers_among_experts_keep_a_name_of_their_own(self) -> None:
        model = analysed("qwen3_moe")
        assert {name: sorted(layers) for name, layers in model.roles.widths.items()} == {
            "moe_intermediate_size": [0], "num_experts": [0], "intermediate_size": [1],
        }  # fmt: skip
        assert widths(model)["moe_intermediate_size"] == 24 and widths(model)["intermediate_size"] == 40

    def test_a_shared_expert_stands_beside_the_routed_ones(self) -> None:
        model = analysed("qwen2_moe")
        assert widths(model)["shared_expert_intermediate_size"] == 16 and widths(model)["moe_intermediate_size"] == 24
        assert status(model, "shared_expert_intermediate_size")[0] == "exact"

    def test_the_filters_of_a_convolution_are_no_stack_of_experts(self) -> None:
        model = analysed("lfm2")
        assert not is_stack(model.table.parameters["model.layers.0.conv.conv.weight"])
        assert is_stack(analysed("mixtral").table.parameters["model.layers.0.mlp.experts.down_proj"])
        assert "shared_expert_intermediate_size" not in model.roles.widths

    def test_what_a_layer_convolves_is_an_axis_of_its_own(self) -> None:
        """The convolution of a hybrid writes into the residual stream as a feed-forward layer does."""
        widths = analysed("lfm2").roles.widths
        assert set(widths) == {"convolved_channels", "intermediate_size"}
        assert set(widths["convolved_channels"]) == {0} and set(widths["intermediate_size"]) == {0, 1}

    def test_two_widths_of_one_kind_in_a_layer_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two layers that are taken for one have two feed-forward layers."""
        model = analysed("llama")
        monkeypatch.setattr(type(model.captured), "layer_in_path", lambda self, path: 0 if ".layers." in path else None)
        roles = find_roles(model.captured, model.table)
        assert roles.refusals == {"intermediate_size": "layer 0 has more than one axis of this kind"}


def test_an_embedding_that_is_cut_is_no_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the width of an embedding is several leaves, the layers tell hidden_size, or, where they are no chain, nothing."""
    from minitron.compiler.roles import roles
    from minitron.specs.errors import UsageError

    def no_chain(captured: Any) -> Any:
        raise UsageError("layer 0 yields 2 values")

    model = analysed("llama")
    captured, table = model.captured, model.table
    space = table.space
    name = "model.embed_tokens.weight"
    cut = {**table.parameters, name: [table.parameters[name][0], space.cat([space.fresh(s) for s in _sizes(20, 12)])]}
    broken = type(table)(space, cut, table.nodes, table.contractions, table.attentions, table.unknown)
    assert find_roles(captured, broken).hidden.leaf is model.roles.hidden.leaf
    monkeypatch.setattr(roles, "layer_ends", no_chain)
    with pytest.raises(UsageError, match="does not yield the residual stream directly"):
        find_roles(captured, broken)


def _sizes(*values: int) -> list[Any]:
    from minitron.compiler.axes.dims import Size

    return [Size(value) for value in values]


# -- the names mean what they say ---------------------------------------------------------------------------------------


def shuffled(model: AnalysedTeacher, seed: int = 0) -> Narrowing:
    """Every axis that is not refused in an order of its own; the query heads of every group in another one."""
    rng = np.random.default_rng(seed)

    def order(leaf: Atom) -> Indices:
        return rng.permutation(leaf.size.coefficient).astype(np.int64)

    names = [name for name in widths(model) if name != LAYERS and status(model, name)[0] != "refused"]
    kept = {leaf: order(leaf) for name in names for leaf in leaves_of(name, model.roles, model.table)}
    dependent = {}
    for site in model.roles.heads.values():
        if HEADS in names and site.group is not None and site.repeat is not None:
            kept.pop(site.repeat, None)
            lists = [order(site.repeat) for _ in range(site.groups)]
            dependent[site.repeat] = Dependent((site.group,), lists, site.repeats)
    return Narrowing(model.table.space, kept, dependent)


@pytest.mark.parametrize("family", EVERY)
def test_permuting_every_named_axis_changes_nothing(family: str) -> None:
    """The query heads differently within every group."""
    model = analysed(family)
    narrowing = shuffled(model)
    assert narrowing.kept
    hugging_face = random_model(config(family))
    parameters = {
        name: value[np.ix_(*(narrowing.positions(dim) for dim in model.table.parameters[name]))]
        for name, value in hugging_face.named_parameters()
        if name in model.table.parameters
    }
    with torch.no_grad():
        wanted = hugging_face(input_ids=IDS, use_cache=False).logits
        got = torch.func.functional_call(hugging_face, parameters, (), {"input_ids": IDS, "use_cache": False}).logits
    assert any(not torch.equal(parameters[name], value) for name, value in hugging_face.named_parameters())
    assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))
