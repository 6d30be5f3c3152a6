"""Gated DeltaNet against transformers' OLMo hybrid layer, and against itself in other arrangements."""

import math

import pytest
from contract_cases import (
    HIDDEN,
    LENGTHS,
    assert_near,
    check_agreement,
    check_batch,
    check_continuation,
    check_declarations,
    check_low_precision,
    check_packing,
    check_padding,
    check_refusal,
    check_transfer,
    context,
    hidden,
    randomised,
)
from transformers import OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

from gearshift.mixers.gated_delta_net import KIND, GatedDeltaNetSpec
from gearshift.mixers.gated_delta_net.module import GatedDeltaNet
from gearshift.spec import MIXERS

OLMO = {
    "conv1d.weight": ["q_conv.weight", "k_conv.weight", "v_conv.weight"],
    "g_proj.weight": ["gate_proj.weight"],
    "o_norm.weight": ["norm.weight"],
}


def mixer(**settings: object) -> GatedDeltaNet:
    given = {"key_heads": 2, "value_heads": 4, "key_dim": 12, "value_dim": 16, **settings}
    return randomised(GatedDeltaNet(GatedDeltaNetSpec.model_validate(given).resolved(HIDDEN), HIDDEN))


def olmo(spec: GatedDeltaNetSpec) -> OlmoHybridGatedDeltaNet:
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
    return OlmoHybridGatedDeltaNet(config, layer_idx=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative_eigenvalues": True},
        {"key_heads": 4, "value_heads": 4, "conv_kernel": 3},
    ],
    ids=["grouped", "negative", "equal"],
)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_transformers_layer(tokens: int, settings: dict[str, object]) -> None:
    ours = mixer(**settings)
    check_agreement(ours, olmo(ours.spec), OLMO, tokens)


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


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_left_padding_changes_nothing(activation: str) -> None:
    check_padding(mixer(conv_activation=activation))


def test_batch_rows_are_separate() -> None:
    check_batch(mixer())


def test_declarations_are_complete() -> None:
    check_declarations(mixer())


def test_low_precision_stays_in_its_dtype() -> None:
    check_low_precision(mixer())


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
    made, plan = check_transfer(KIND.transfer_from("attention"), GatedDeltaNet, conv_kernel=3)
    spec = made.spec
    sizes = (spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim, spec.conv_kernel)
    assert sizes == (6, 6, 10, 10, 3)
    assert plan["A_log"].value == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("wrong", [{"value_heads": 12}, {"key_heads": 2}, {"key_dim": 8}, {"value_dim": 20}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    check_refusal(KIND.transfer_from("attention"), wrong)
