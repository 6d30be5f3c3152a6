"""Qwen3's mixtures of experts: Qwen3 with experts in some layers and a gated MLP in the others."""

from typing import Any

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    DECODER,
    IMPLIED_HEAD_DIM,
    JUNK,
    LLAMA_WEIGHTS,
    OUTPUT_BIAS,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    QK_NORM,
    QK_NORMS,
    QKV_BIASES,
    ROTARY,
    ROTARY_NESTED,
    SOFTMAX_ROUTER,
    STACKED_EXPERTS,
    expert_weights,
)
from gearshift.formats.dialect import Dialect
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, mapped
from gearshift.formats.layers import BlockKind, LayerNumbers, LayerStep
from gearshift.formats.tensors import Tensors
from gearshift.spec import ModelSpec


class _WindowSwitch(Dialect):
    """`sliding_window` counts only where `use_sliding_window` is set. The config class reads it so."""

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        return config if config["sliding_window"] is None else config | {"use_sliding_window": True}


FORMAT = FamilyFormat(
    name="qwen3_moe",
    model_type="qwen3_moe",
    config_class="transformers.models.qwen3_moe.configuration_qwen3_moe:Qwen3MoeConfig",
    nested=ROTARY_NESTED,
    # Transformers 5 writes the one name of it and publishers the other.
    aliases={**ALIASES, "num_local_experts": "num_experts"},
    dialect=_WindowSwitch(),
    blocks={"sparse": BlockKind("attention", "mixture_of_experts"), "dense": BlockKind("attention")},
    layers=(
        LayerStep("decoder_sparse_step", every=("sparse", "dense"), others=("dense",)),
        LayerNumbers("mlp_only_layers", listed=("dense",), others=("sparse", "dense")),
    ),
    fates=(
        *ANY_MODEL,
        *DECODER,
        *QK_NORM,
        *ATTENTION,
        IMPLIED_HEAD_DIM,
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *SOFTMAX_ROUTER,
        Constant("architectures", ["Qwen3MoeForCausalLM"], same=(None,)),
        mapped("sliding_window", "layer.mixer.window"),
        Carried("use_sliding_window"),
        # All layers have the window or none has, whatever it says.
        Carried("max_window_layers"),
        mapped("attention_bias", "layer.mixer.qkv_bias", "layer.mixer.output_bias"),
        mapped("hidden_act", "layer.mlp.activation"),
        mapped("intermediate_size", "dense.mlp.intermediate_size"),
        mapped("moe_intermediate_size", "sparse.mlp.intermediate_size"),
        mapped("num_experts", "layer.mlp.experts"),
        mapped("num_experts_per_tok", "layer.mlp.experts_per_token"),
        mapped("norm_topk_prob", "layer.mlp.normalise"),
        Fixed("layer.mixer.qk_norm.zero_centered", False),
        Fixed("sparse.mlp.type", "mixture_of_experts"),
        Fixed("dense.mlp.type", "gated"),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors(
        (
            *LLAMA_WEIGHTS,
            *QK_NORMS,
            *QKV_BIASES,
            *OUTPUT_BIAS,
            *expert_weights("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
        JUNK,
        others=STACKED_EXPERTS,
    ),
)
