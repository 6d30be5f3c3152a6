"""Transformers leaves a key out that was published; these checkpoints have it."""

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

from tests.formats.families import COMMON, NULLS, ROPES, SIZES, Family


class Bamba(Family):
    def save(self, folder: Path, **settings: Any) -> PreTrainedModel:
        model = super().save(folder, **settings)
        config = model.config
        if config.attn_layer_indices:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            path = folder / "config.json"
            rotated = int(head_dim * config.rope_parameters["partial_rotary_factor"])
            path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_rotary_emb": rotated}))
        return model

    def runs_otherwise(self, model: PreTrainedModel) -> str | None:
        if model.config.mamba_n_groups > 1 and "group_size" not in inspect.signature(BambaRMSNormGated).parameters:
            return "before transformers 5.23, its Bamba norms all groups as one"
        return None


FAMILY = Bamba(
    config="BambaConfig",
    model="BambaForCausalLM",
    sizes={**SIZES, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 10},
    full={"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        *({"rope_parameters": rope} for rope in ROPES.values()),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {**ROPES["yarn"], "partial_rotary_factor": 1.0}},
        NULLS,
        {"num_key_value_heads": None},
        {"attn_layer_indices": [0, 2]},
        {"attn_layer_indices": [0, 1, 2]},
        # Transformers makes no cache for a model without attention.
        {"attn_layer_indices": None, "use_cache": False},
        {"attn_layer_indices": [], "use_cache": False},
        {"head_dim": 12},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"mamba_n_heads": 16},
        {"mamba_n_heads": 4, "mamba_d_head": 16},
        {"mamba_n_groups": 2},
        {"mamba_d_state": 12},
        {"mamba_d_conv": 3},
        {"mamba_expand": 3},
        {"mamba_chunk_size": 16},
        {"mamba_conv_bias": False},
        {"mamba_proj_bias": True},
        {"time_step_limit": (0.7, 0.9)},
        {"time_step_limit": (0.7, float("inf"))},
        {"num_logits_to_keep": 2},
        {"z_loss_coefficient": 0.1},
    ),
    refused={"attn_rotary_emb": 3},
)
