"""Kimi Delta Attention against transformers' Kimi Linear layer, and against itself in other arrangements."""

import pytest
from contract_cases import (
    HIDDEN,
    LENGTHS,
    check_agreement,
    check_batch,
    check_continuation,
    check_declarations,
    check_low_precision,
    check_packing,
    check_padding,
    check_refusal,
    check_transfer,
    randomised,
)
from transformers import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from gearshift.mixers.kimi_delta_attention import KIND, KimiDeltaAttentionSpec
from gearshift.mixers.kimi_delta_attention.module import KimiDeltaAttention
from gearshift.spec import MIXERS

KIMI = {
    "conv1d.weight": ["q_conv.weight", "k_conv.weight", "v_conv.weight"],
    "forget_gate.f_a_proj.weight": ["decay_down_proj.weight"],
    "forget_gate.f_b_proj.weight": ["decay_up_proj.weight"],
    "forget_gate.dt_bias": ["dt_bias"],
    "forget_gate.A_log": ["A_log"],
    "g_a_proj.weight": ["gate_down_proj.weight"],
    "g_b_proj.weight": ["gate_up_proj.weight"],
    "o_norm.weight": ["norm.weight"],
}


def mixer(**settings: object) -> KimiDeltaAttention:
    given = {"heads": 3, "head_dim": 12, **settings}
    return randomised(KimiDeltaAttention(KimiDeltaAttentionSpec.model_validate(given).resolved(HIDDEN), HIDDEN))


def kimi(spec: KimiDeltaAttentionSpec) -> KimiLinearDeltaAttention:
    config = KimiLinearConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        linear_num_heads=spec.heads,
        linear_head_dim=spec.head_dim,
        linear_conv_kernel_dim=spec.conv_kernel,
        rms_norm_eps=spec.norm_epsilon,
    )
    theirs = KimiLinearDeltaAttention(config, layer_idx=0)
    theirs.o_norm.activation = spec.gate_activation
    return theirs


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_transformers_layer(tokens: int, gate: str) -> None:
    ours = mixer(gate_activation=gate)
    check_agreement(ours, kimi(ours.spec), KIMI, tokens)


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
    check_declarations(mixer(decay_rank=5, gate_rank=7))


def test_low_precision_stays_in_its_dtype() -> None:
    check_low_precision(mixer())


def test_sizes_left_out_are_derived() -> None:
    spec = KimiDeltaAttentionSpec(heads=4).resolved(64)
    assert (spec.head_dim, spec.decay_rank, spec.gate_rank) == (16, 16, 16)
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        KimiDeltaAttentionSpec(heads=5).resolved(64)


def test_the_registry_finds_it() -> None:
    assert MIXERS["kimi_delta_attention"].load() is KimiDeltaAttention


def test_transfer_from_attention() -> None:
    made, _ = check_transfer(KIND.transfer_from("attention"), KimiDeltaAttention, gate_activation="silu")
    assert (made.spec.heads, made.spec.head_dim, made.spec.gate_activation) == (6, 10, "silu")


@pytest.mark.parametrize("wrong", [{"heads": 12}, {"head_dim": 8}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    check_refusal(KIND.transfer_from("attention"), wrong)
