"""Gated DeltaNet against transformers' OLMo hybrid layer, and against itself in other arrangements."""

import math

import pytest
import torch
from delta_cases import (
    HIDDEN,
    assert_near,
    check_batch,
    check_continuation,
    check_declarations,
    check_packing,
    check_padding,
    context,
    gradients,
    hidden,
    randomised,
)
from transformers import OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.gated_delta_net import KIND, GatedDeltaNetSpec
from gearshift.mixers.gated_delta_net.module import GatedDeltaNet
from gearshift.plan import Initialiser, TensorInfo, infer
from gearshift.spec import MIXERS

OLMO = {"conv1d.weight": ["q_conv.weight", "k_conv.weight", "v_conv.weight"], "g_proj.weight": ["gate_proj.weight"]}
OLMO["o_norm.weight"] = ["norm.weight"]


def mixer(**settings: object) -> GatedDeltaNet:
    given = {"key_heads": 2, "value_heads": 4, "key_dim": 12, "value_dim": 16, **settings}
    return randomised(GatedDeltaNet(GatedDeltaNetSpec.model_validate(given).resolved(HIDDEN), HIDDEN))


def olmo(ours: GatedDeltaNet) -> OlmoHybridGatedDeltaNet:
    spec = ours.spec
    config = OlmoHybridConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        linear_num_key_heads=spec.key_heads,
        linear_num_value_heads=spec.value_heads,
        linear_key_head_dim=spec.key_dim,
        linear_value_head_dim=spec.value_dim,
        linear_conv_kernel_dim=spec.conv_kernel,
        linear_allow_neg_eigval=spec.negative_eigenvalues,
    )
    theirs = OlmoHybridGatedDeltaNet(config, layer_idx=0)
    weights = ours.state_dict()
    for name, parameter in theirs.named_parameters():
        parameter.data = torch.cat([weights[own] for own in OLMO.get(name, [name])]).clone()
    return theirs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative_eigenvalues": True},
        {"key_heads": 4, "value_heads": 4, "conv_kernel": 3},
    ],
    ids=["grouped", "negative", "equal"],
)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_transformers_layer(tokens: int, settings: dict[str, object]) -> None:
    ours = mixer(**settings)
    theirs = olmo(ours)
    x = hidden(tokens, batch=2)
    here, there = ours(x, context(tokens, batch=2)), theirs(x)
    assert_near(here, there, 1e-4, "output")
    own = gradients(here, {"hidden": x, **dict(ours.named_parameters())})
    for name, expected in gradients(there, {"hidden": x, **dict(theirs.named_parameters())}).items():
        assert_near(torch.cat([own[part] for part in OLMO.get(name, [name])]), expected, 1e-4, name)


def test_other_gate_activations_apply() -> None:
    silu, sigmoid = mixer(), mixer(activation="sigmoid")
    x = hidden(10)
    result = silu.core(silu.project(x, context(10)), context(10), None)
    ratio = (result.gate.sigmoid() * result.gate).flatten(2) / result.gate.sigmoid().flatten(2)
    assert_near(silu.features(result), sigmoid.features(result) * ratio, 1e-5)


def test_state_carries_over() -> None:
    check_continuation(mixer())


@pytest.mark.parametrize("lengths", [[5, 1, 70, 3], [2, 2, 2]])
def test_packed_documents_are_separate(lengths: list[int]) -> None:
    check_packing(mixer(), lengths)


def test_left_padding_changes_nothing() -> None:
    check_padding(mixer())


def test_batch_rows_are_separate() -> None:
    check_batch(mixer())


def test_declarations_are_complete() -> None:
    check_declarations(mixer())


def test_low_precision_stays_in_its_dtype() -> None:
    ours = mixer()
    x = hidden(70).detach()
    output = mixer().bfloat16()(x.bfloat16(), context(70))
    assert output.dtype == torch.bfloat16
    assert_near(output, ours(x, context(70)), 5e-2)


def test_sizes_left_out_are_derived() -> None:
    spec = GatedDeltaNetSpec(key_heads=4).resolved(64)
    assert (spec.value_heads, spec.key_dim, spec.value_dim) == (4, 16, 16)
    with pytest.raises(ValueError, match="does not divide into 5 key_heads"):
        GatedDeltaNetSpec(key_heads=5).resolved(64)
    with pytest.raises(ValueError, match="among 6 value_heads"):
        GatedDeltaNetSpec(key_heads=4, value_heads=6).resolved(64)


def test_the_registry_finds_it() -> None:
    assert MIXERS["gated_delta_net"].load() is GatedDeltaNet


def test_transfer_from_attention() -> None:
    transfer = KIND.transfer_from("attention")
    source = AttentionSpec(heads=6, kv_heads=2, head_dim=10).resolved(HIDDEN)
    target = transfer.infer(source, HIDDEN, {"conv_kernel": 3})
    sizes = (target.key_heads, target.value_heads, target.key_dim, target.value_dim, target.conv_kernel)
    assert sizes == (6, 6, 10, 10, 3)
    rows = {"q": 60, "k": 20, "v": 20}
    schema = {f"{name}_proj.weight": TensorInfo((count, HIDDEN), "float32") for name, count in rows.items()}
    schema["o_proj.weight"] = TensorInfo((HIDDEN, 60), "float32")
    made = transfer.plan(source, target, HIDDEN)
    shapes = {name: tuple(x.shape) for name, x in GatedDeltaNet(target, HIDDEN).named_parameters()}
    for name, expression in made.items():
        if not isinstance(expression, Initialiser):
            assert infer(expression, schema).shape == shapes[name], name
    assert made["A_log"].value == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("wrong", [{"value_heads": 12}, {"key_heads": 2}, {"key_dim": 8}, {"value_dim": 20}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    transfer = KIND.transfer_from("attention")
    source = AttentionSpec(heads=6, kv_heads=2, head_dim=10).resolved(HIDDEN)
    target = transfer.infer(source, HIDDEN, wrong)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))} cannot start from"):
        transfer.plan(source, target, HIDDEN)
