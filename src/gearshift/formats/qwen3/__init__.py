"""Qwen3: norms on queries and keys, a window in some layers."""

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    DECODER,
    GATED_MLP,
    HEAD_DIM,
    JUNK,
    LAYER_TYPES,
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
    WINDOWED_BLOCKS,
    WINDOWS,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, mapped
from gearshift.formats.layers import LayerSwitch
from gearshift.formats.tensors import Tensors

FORMAT = FamilyFormat(
    name="qwen3",
    model_type="qwen3",
    config_class="transformers.models.qwen3.configuration_qwen3:Qwen3Config",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    blocks=WINDOWED_BLOCKS,
    layers=(
        LAYER_TYPES,
        LayerSwitch("use_sliding_window", switched=("sliding_attention",), others=("full_attention",)),
    ),
    fates=(
        *ANY_MODEL,
        *DECODER,
        *GATED_MLP,
        *QK_NORM,
        *ATTENTION,
        HEAD_DIM,
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *WINDOWS,
        Constant("architectures", ["Qwen3ForCausalLM"], same=(None,)),
        # Says how layer_types comes about where it is not given.
        Carried("max_window_layers"),
        Fixed("layer.mixer.qk_norm.zero_centered", False),
        mapped("attention_bias", "layer.mixer.qkv_bias", "layer.mixer.output_bias"),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors((*LLAMA_WEIGHTS, *QK_NORMS, *QKV_BIASES, *OUTPUT_BIAS), JUNK),
)
