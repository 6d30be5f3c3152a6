"""Transformers saves other names than were published and it reads; these checkpoints are as published."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.formats.families import COMMON, NULLS, Family

LAYER_TYPES = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
MLP_TYPES = ["dense", "sparse", "sparse", "dense"]
FITTED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
PUBLISHED = {
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
    "use_grouped_topk": True,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}


class KimiLinear(Family):
    def save(self, folder: Path, **settings: Any) -> PreTrainedModel:
        model = super().save(folder, **settings)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name in list(tensors):
            if ".block_sparse_moe." in name and not any(part in name for part in ("experts", ".gate.")):
                tensors[name.replace(".block_sparse_moe.", ".mlp.")] = tensors.pop(name)
        for name, bias in model.named_buffers():
            if name.endswith("correction_bias"):  # no parameter, so `save` left it at zero; it is always float32
                noise = torch.randn(bias.shape)
                bias.copy_(noise)
                tensors[name.replace(".mlp.", ".block_sparse_moe.")] = noise
        save_file(tensors, path, {"format": "pt"})
        self._publish(folder / "config.json", model.config)
        return model

    def _publish(self, path: Path, config: Any) -> None:
        """Say what the published configs say beside what transformers' class writes."""
        raw = json.loads(path.read_text()) | PUBLISHED
        numbered = list(enumerate(config.layer_types, 1))
        raw["linear_attn_config"] = {
            "head_dim": config.linear_head_dim,
            "num_heads": config.linear_num_heads,
            "short_conv_kernel_size": config.linear_conv_kernel_dim,
            "full_attn_layers": [number for number, kind in numbered if kind == "full_attention"],
            "kda_layers": [number for number, kind in numbered if kind == "linear_attention"],
        }
        dense = config.mlp_layer_types.count("dense")
        if "dense" not in config.mlp_layer_types[dense:]:
            raw["first_k_dense_replace"] = dense
        path.write_text(json.dumps(raw))


FAMILY = KimiLinear(
    config="KimiLinearConfig",
    model="KimiLinearForCausalLM",
    sizes={
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "layer_types": LAYER_TYPES,
        "mlp_layer_types": MLP_TYPES,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    full={"attention_bias": True, "q_lora_rank": 10},
    sweep=(
        *({key: value} for key, value in COMMON.items() if key not in FITTED),
        NULLS,
        # Transformers makes no cache for a model without attention.
        {"num_hidden_layers": 3, "layer_types": None, "mlp_layer_types": None, "use_cache": False},
        {"num_hidden_layers": 5, "layer_types": None, "mlp_layer_types": None},
        {"layer_types": ["linear_attention"] * 4, "num_key_value_heads": 2, "use_cache": False},
        {"layer_types": ["full_attention"] * 4},
        {"mlp_layer_types": ["dense"] * 4},
        {"mlp_layer_types": ["sparse"] * 4},
        {"num_attention_heads": 2, "num_key_value_heads": None},
        {"attention_bias": True},
        {"attention_bias": True, "q_lora_rank": 10},
        {"kv_lora_rank": 9},
        {"qk_nope_head_dim": 7},
        {"qk_rope_head_dim": 6},
        {"v_head_dim": 5},
        {"moe_intermediate_size": 20},
        {"n_shared_experts": 3},
        {"num_local_experts": 6},
        {"num_experts_per_tok": 3},
        {"routed_scaling_factor": 1.5},
        {"norm_topk_prob": False},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 2, "topk_group": 1},
        {"linear_head_dim": 6},
        {"linear_num_heads": 2},
        {"linear_conv_kernel_dim": 3},
        {"output_router_logits": True},
        {"pretraining_tp": 2},
        {"tie_word_embeddings": True},
    ),
    refused={"num_key_value_heads": 2},
)
