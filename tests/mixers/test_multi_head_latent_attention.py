"""Latent attention against transformers' Kimi Linear and DeepSeek-V3, and against itself in other arrangements."""

from collections.abc import Mapping

import pytest
import torch
from contract_cases import (
    HIDDEN,
    check_agreement,
    check_batch,
    check_continuation,
    check_declarations,
    check_low_precision,
    check_packing,
    check_padding,
    hidden,
    randomised,
)
from torch import Tensor, nn
from transformers import DeepseekV3Config, KimiLinearConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.mixers.multi_head_latent_attention import MultiHeadLatentAttentionSpec
from gearshift.mixers.multi_head_latent_attention.module import MultiHeadLatentAttention
from gearshift.spec import MIXERS

SIZES = {"heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
KEYS = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
YARN = {"factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.3}
NAMES = {
    "q_a_proj": "q_down_proj",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up_proj",
    "kv_a_proj_with_mqa": "kv_down_proj",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up_proj",
}


def mixer(**settings: object) -> MultiHeadLatentAttention:
    spec = MultiHeadLatentAttentionSpec.model_validate({**SIZES, **settings}).resolved(HIDDEN)
    return randomised(MultiHeadLatentAttention(spec, HIDDEN))


def check_layer(ours: MultiHeadLatentAttention, theirs: nn.Module, tokens: int, **more: object) -> None:
    """Agreement with a layer of transformers', which is called with `more` beside the hidden states."""

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(hidden_states=x, attention_mask=None, **more)[0]

    names = {}
    for name, _ in theirs.named_parameters():
        module, _, kind = name.partition(".")
        names[name] = [f"{NAMES.get(module, module)}.{kind}"]
    check_agreement(ours, theirs, names, tokens, 1e-5, run)


@pytest.mark.parametrize("rank", [None, 18], ids=["plain queries", "latent queries"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("tokens", [1, 50])
def test_kimi_linear(tokens: int, bias: bool, rank: int | None) -> None:
    config = KimiLinearConfig(**KEYS, q_lora_rank=rank, attention_bias=bias, attn_implementation="sdpa")
    theirs = KimiLinearAttention(config, layer_idx=0)
    check_layer(mixer(rotary=None, q_lora_rank=rank, bias=bias), theirs, tokens)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary", [{"theta": 500.0}, {"theta": 500.0, "type": "yarn", **YARN}], ids=["rope", "yarn"])
def test_deepseek_v3(rotary: Mapping[str, object], interleaved: bool) -> None:
    rope = {"rope_type": "default", **rotary, "rope_theta": rotary["theta"]}
    rope["rope_type"] = rope.pop("type", "default")
    config = DeepseekV3Config(
        **KEYS,
        q_lora_rank=18,
        rope_interleave=interleaved,
        rope_parameters={name: value for name, value in rope.items() if name != "theta"},
        max_position_embeddings=256,
        attn_implementation="sdpa",
    )
    tokens = 50
    x = hidden(tokens, batch=2)
    tables = DeepseekV3RotaryEmbedding(config)(x, torch.arange(tokens)[None])
    ours = mixer(q_lora_rank=18, rotary=rotary, interleaved=interleaved)
    check_layer(ours, DeepseekV3Attention(config, layer_idx=0), tokens, position_embeddings=tables)


@pytest.mark.parametrize("rotary", [None, {"theta": 500.0}], ids=["no positions", "rope"])
def test_cached_decoding_equals_recomputation(rotary: Mapping[str, object] | None) -> None:
    ours, tokens, batch = mixer(rotary=rotary), 40, 2
    state = check_continuation(ours, tokens, batch)
    assert {name: tuple(kept.shape) for name, kept in state.tensors.items()} == {
        "latent": (batch, tokens, 20),
        "rope_key": (batch, tokens, 6),
    }
    assert state.bytes == batch * sum(tensor.bytes(tokens, "float32") for tensor in ours.spec.state())
    assert state.croppable


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[5, 1, 30, 3], [2, 2, 2]])
def test_packed_documents_are_separate(
    lengths: list[int], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gearshift.mixers.base.MixContext.attn_implementation", implementation)
    check_packing(mixer(interleaved=True), lengths)


def test_left_padding_changes_nothing() -> None:
    check_padding(mixer())


def test_batch_rows_are_separate() -> None:
    check_batch(mixer())


def test_low_precision_stays_in_its_dtype() -> None:
    check_low_precision(mixer())


def test_declarations_are_complete() -> None:
    check_declarations(*(mixer(q_lora_rank=rank, bias=bias) for rank in (None, 18) for bias in (False, True)))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="even qk_rope_head_dim, not 5"):
        mixer(qk_rope_head_dim=5)
    with pytest.raises(ValueError, match=r"share of 0\.5"):
        mixer(rotary={"share": 0.5})
    assert mixer(qk_rope_head_dim=5, rotary=None).spec.qk_rope_head_dim == 5


def test_a_model_of_it_generates_as_it_recomputes() -> None:
    assert MIXERS["multi_head_latent_attention"].load() is MultiHeadLatentAttention
    block = {
        "mixer": {"type": "multi_head_latent_attention", **SIZES},
        "mlp": {"type": "gated", "intermediate_size": 9},
    }
    decoder = {"num_layers": 2, "pattern": ["block"], "blocks": {"block": block}}
    spec = ModelSpec.model_validate({"vocab_size": 31, "hidden_size": HIDDEN, "max_positions": 64, "decoder": decoder})
    torch.manual_seed(0)
    model = randomised(GearshiftForCausalLM(GearshiftConfig(spec))).eval()
    ids = torch.randint(3, 31, (2, 7))
    cached = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False))
