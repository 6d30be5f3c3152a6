"""Mixtral: Mistral with a mixture of experts in every layer."""

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    ATTENTION_WEIGHTS,
    DECODER,
    JUNK,
    NO_QK_NORM,
    NORM_WEIGHTS,
    OUTER_WEIGHTS,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    ROTARY,
    ROTARY_NESTED,
    SOFTMAX_ROUTER,
    STACKED_EXPERTS,
    expert_weights,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, Mapped, mapped
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Tensors, Weight

FORMAT = FamilyFormat(
    name="mixtral",
    model_type="mixtral",
    config_class="transformers.models.mixtral.configuration_mixtral:MixtralConfig",
    nested=ROTARY_NESTED,
    aliases={**ALIASES, "num_experts": "num_local_experts"},
    blocks={"layer": BlockKind("attention", "mixture_of_experts")},
    fates=(
        *ANY_MODEL,
        *DECODER,
        *ATTENTION,
        # Null means hidden_size / num_attention_heads, as it does for us.
        Mapped("head_dim", ("layer.mixer.head_dim",), default=None, spelled=True),
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *NO_QK_NORM,
        *SOFTMAX_ROUTER,
        Constant("architectures", ["MixtralForCausalLM"], same=(None,)),
        mapped("sliding_window", "layer.mixer.window"),
        mapped("intermediate_size", "layer.mlp.intermediate_size"),
        mapped("hidden_act", "layer.mlp.activation"),
        mapped("num_local_experts", "layer.mlp.experts"),
        mapped("num_experts_per_tok", "layer.mlp.experts_per_token"),
        # Noise on what the router reads, in training alone.
        Carried("router_jitter_noise"),
        Fixed("layer.mixer.qkv_bias", False),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.type", "mixture_of_experts"),
        Fixed("layer.mlp.normalise", True),
    ),
    tensors=Tensors(
        (*OUTER_WEIGHTS, *NORM_WEIGHTS, *ATTENTION_WEIGHTS, *expert_weights("block_sparse_moe", "w1", "w3", "w2")),
        JUNK,
        others=(
            *STACKED_EXPERTS,
            Weight("model.layers.{layer}.mlp.router.weight", "model.layers.{layer}.mlp.gate.weight"),
        ),
    ),
)
