"""Configs as they were published: read as the models that they are, and written back with the same settings."""

import copy
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from transformers import AutoConfig

from gearshift.formats import FORMATS
from gearshift.formats.fates import RUNTIME_ONLY
from gearshift.model import schema

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMO_HYBRID = {
    "architectures": ["OlmoHybridForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 3840,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
    "linear_allow_neg_eigval": True,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 96,
    "linear_num_key_heads": 30,
    "linear_num_value_heads": 30,
    "linear_value_head_dim": 192,
    "max_position_embeddings": 65536,
    "model_type": "olmo_hybrid",
    "num_attention_heads": 30,
    "num_hidden_layers": 32,
    "num_key_value_heads": 30,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_parameters": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0",
    "use_cache": True,
    "vocab_size": 100352,
}
FULL_LAYERS = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_kimi.KimiLinearConfig",
        "AutoModel": "modeling_kimi.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
    },
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL_LAYERS,
        "head_dim": 128,
        "kda_layers": [number for number in range(1, 28) if number not in FULL_LAYERS],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.56.2",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
BAMBA = {
    "architectures": ["BambaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_layer_indices": [9, 18, 27],
    "attn_rotary_emb": 64,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "bamba",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
PUBLISHED: list[tuple[dict[str, Any], float]] = [
    (MIXTRAL, 46.70e9),
    (QWEN3_MOE, 30.53e9),
    (OLMO_HYBRID, 7.431e9),
    (KIMI_LINEAR, 49.12e9),
    (BAMBA, 9.78e9),
]
"""Configs, and the parameters that the models are said to have."""
REWRITTEN = {"torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "auto_map"}
"""Older keys, which are written as today's, and the code that came with a model."""


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED, ids=lambda value: str(value)[:40])
def test_it_is_read_as_the_model_it_is(config: dict[str, Any], parameters: float) -> None:
    native = FORMATS[config["model_type"]].to_native(config)
    sizes = [math.prod(info.shape) for info in schema(native.spec, "bfloat16").values()]
    assert sum(sizes) == pytest.approx(parameters, rel=2e-3)
    assert native.dtype == config.get("dtype", config.get("torch_dtype", "float32"))


@pytest.mark.parametrize("config", [config for config, _ in PUBLISHED], ids=lambda config: config["model_type"])
def test_it_is_written_back_the_same(config: dict[str, Any]) -> None:
    family = FORMATS[config["model_type"]]
    native = family.to_native(config)
    back = family.to_config(native)
    same = [key for key in config if key not in REWRITTEN and key not in RUNTIME_ONLY]
    assert {key: back.get(key) for key in same} == {key: config[key] for key in same}
    assert family.to_native(back) == native
    one, other = (AutoConfig.for_model(**copy.deepcopy(raw)) for raw in (config, back))
    for key in fields(one):
        # Transformers takes the null that this was published with for the default.
        if (config["model_type"], key.name) != ("olmo_hybrid", "rope_parameters") and key.name not in RUNTIME_ONLY:
            assert getattr(one, key.name) == getattr(other, key.name), key.name


def test_dream_keeps_the_name_that_its_authors_gave_it() -> None:
    family = FORMATS.for_model_type("Dream")
    assert family is FORMATS.for_model_type("dream")
    native = family.to_native(DREAM)
    assert native.spec == family.to_native({**DREAM, "model_type": "dream"}).spec
    assert not native.spec.decoder.blocks["layer"].mixer.causal
    sizes = [math.prod(info.shape) for info in schema(native.spec, "bfloat16").values()]
    assert sum(sizes) == pytest.approx(7.616e9, rel=1e-3)
    renamed = {key: value for key, value in DREAM.items() if key not in ("torch_dtype", "transformers_version")}
    assert family.to_config(native) == renamed | {"dtype": "bfloat16"}
    assert family.to_config(replace(native, source={}))["model_type"] == "dream"


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"model_type": "DREAM"}, "'model_type' is 'DREAM'"), ({"use_mrope": True}, "'use_mrope' is True")],
)
def test_what_dream_is_not(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FORMATS["dream"].to_native({**DREAM, **changes})


def test_positions() -> None:
    specs = {config["model_type"]: FORMATS[config["model_type"]].to_native(config).spec for config, _ in PUBLISHED}
    rotaries = {
        name: next(block.mixer for block in reversed(spec.decoder.layers) if hasattr(block.mixer, "rotary")).rotary
        for name, spec in specs.items()
    }
    assert rotaries["olmo_hybrid"] is None
    assert rotaries["kimi_linear"] is None
    assert rotaries["bamba"].share == 0.5
    assert rotaries["mixtral"].theta == rotaries["qwen3_moe"].theta == 1e6
