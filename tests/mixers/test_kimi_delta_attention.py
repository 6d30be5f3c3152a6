"""Kimi Delta Attention against transformers' Kimi Linear layer, and against itself in other arrangements."""

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
from transformers import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.kimi_delta_attention import KIND, KimiDeltaAttentionSpec
from gearshift.mixers.kimi_delta_attention.module import KimiDeltaAttention
from gearshift.plan import Initialiser, TensorInfo, infer
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


def kimi(ours: KimiDeltaAttention) -> KimiLinearDeltaAttention:
    spec = ours.spec
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
    weights = ours.state_dict()
    for name, parameter in theirs.named_parameters():
        parameter.data = torch.cat([weights[own] for own in KIMI.get(name, [name])]).clone().view_as(parameter)
    return theirs


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_transformers_layer(tokens: int, gate: str) -> None:
    ours = mixer(gate_activation=gate)
    theirs = kimi(ours)
    x = hidden(tokens, batch=2)
    here, there = ours(x, context(tokens, batch=2)), theirs(x)
    assert_near(here, there, 1e-4, "output")
    own = gradients(here, {"hidden": x, **dict(ours.named_parameters())})
    for name, expected in gradients(there, {"hidden": x, **dict(theirs.named_parameters())}).items():
        gradient = torch.cat([own[part] for part in KIMI.get(name, [name])])
        assert_near(gradient.view_as(expected), expected, 1e-4, name)


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
    check_declarations(mixer(decay_rank=5, gate_rank=7))


def test_low_precision_stays_in_its_dtype() -> None:
    ours = mixer()
    x = hidden(70).detach()
    output = mixer().bfloat16()(x.bfloat16(), context(70))
    assert output.dtype == torch.bfloat16
    assert_near(output, ours(x, context(70)), 5e-2)


def test_sizes_left_out_are_derived() -> None:
    spec = KimiDeltaAttentionSpec(heads=4).resolved(64)
    assert (spec.head_dim, spec.decay_rank, spec.gate_rank) == (16, 16, 16)
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        KimiDeltaAttentionSpec(heads=5).resolved(64)


def test_the_registry_finds_it() -> None:
    assert MIXERS["kimi_delta_attention"].load() is KimiDeltaAttention


def test_transfer_from_attention() -> None:
    transfer = KIND.transfer_from("attention")
    source = AttentionSpec(heads=6, kv_heads=2, head_dim=10).resolved(HIDDEN)
    target = transfer.infer(source, HIDDEN, {"gate_activation": "silu"})
    assert (target.heads, target.head_dim, target.gate_activation) == (6, 10, "silu")
    rows = {"q": 60, "k": 20, "v": 20}
    schema = {f"{name}_proj.weight": TensorInfo((count, HIDDEN), "float32") for name, count in rows.items()}
    schema["o_proj.weight"] = TensorInfo((HIDDEN, 60), "float32")
    shapes = {name: tuple(x.shape) for name, x in KimiDeltaAttention(target, HIDDEN).named_parameters()}
    for name, expression in transfer.plan(source, target, HIDDEN).items():
        if not isinstance(expression, Initialiser):
            assert infer(expression, schema).shape == shapes[name], name


@pytest.mark.parametrize("wrong", [{"heads": 12}, {"head_dim": 8}])
def test_transfer_refuses_other_heads(wrong: dict[str, int]) -> None:
    transfer = KIND.transfer_from("attention")
    source = AttentionSpec(heads=6, kv_heads=2, head_dim=10).resolved(HIDDEN)
    target = transfer.infer(source, HIDDEN, wrong)
    with pytest.raises(ValueError, match="cannot start from attention"):
        transfer.plan(source, target, HIDDEN)
