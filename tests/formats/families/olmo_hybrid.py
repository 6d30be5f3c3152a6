"""Transformers saves other names and pieces than it publishes and reads; these checkpoints are as published."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.formats.families import COMMON, NULLS, ROPES, SIZES, Family

LAYER_TYPES = ["linear_attention", "full_attention", "linear_attention"]
NO_POSITIONS = {"rope_type": "default", "rope_theta": None}


class OlmoHybrid(Family):
    def save(self, folder: Path, **settings: Any) -> PreTrainedModel:
        model = super().save(folder, **settings)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for number, kind in enumerate(model.config.layer_types):
            layer = f"model.layers.{number}"
            if kind == "full_attention":
                norm = tensors.pop(f"{layer}.feedforward_layer_norm.weight")
                tensors[f"{layer}.post_attention_layernorm.weight"] = norm
                continue
            names = [f"{layer}.linear_attn.{name}_conv1d.weight" for name in "qkv"]
            sizes = [len(tensors[f"{layer}.linear_attn.{name}_proj.weight"]) for name in "qkv"]
            parts = torch.cat([tensors[name] for name in names]).split(sizes)
            tensors |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
        save_file(tensors, path, {"format": "pt"})
        return model


FAMILY = OlmoHybrid(
    config="OlmoHybridConfig",
    model="OlmoHybridForCausalLM",
    sizes={**SIZES, "layer_types": LAYER_TYPES},
    full={"attention_bias": True},
    sweep=(
        *({key: value} for key, value in COMMON.items() if key != "num_hidden_layers"),
        *({"rope_parameters": rope} for rope in (*ROPES.values(), NO_POSITIONS)),
        NULLS,
        {"num_hidden_layers": 2, "layer_types": None},
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        {"num_key_value_heads": None},
        {"attention_bias": True},
        {"linear_num_key_heads": 2},
        {"linear_num_value_heads": 8},
        {"linear_key_head_dim": 10},
        {"linear_value_head_dim": 7},
        {"linear_conv_kernel_dim": 3},
        {"linear_allow_neg_eigval": False},
        {"linear_a_log_min": 0.5},
        {"linear_a_log_max": 8.0},
        {"linear_dt_min": 0.01},
        {"linear_dt_max": 0.2},
        {"linear_dt_init_floor": 1e-3},
    ),
)
