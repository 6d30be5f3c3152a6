"""Qwen2 and Qwen2.5: biases on queries, keys and values, a window in some layers."""

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    DECODER,
    GATED_MLP,
    IMPLIED_HEAD_DIM,
    JUNK,
    LAYER_TYPES,
    LLAMA_WEIGHTS,
    NO_QK_NORM,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    QKV_BIASES,
    ROTARY,
    ROTARY_NESTED,
    WINDOWED_BLOCKS,
    WINDOWS,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed
from gearshift.formats.layers import LayerSwitch
from gearshift.formats.tensors import Tensors

FORMAT = FamilyFormat(
    name="qwen2",
    model_type="qwen2",
    config_class="transformers.models.qwen2.configuration_qwen2:Qwen2Config",
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
        *ATTENTION,
        IMPLIED_HEAD_DIM,
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *WINDOWS,
        Constant("architectures", ["Qwen2ForCausalLM"], same=(None,)),
        *NO_QK_NORM,
        # Says how layer_types comes about where it is not given.
        Carried("max_window_layers"),
        # What Qwen2.5's configs hold: positions of several dimensions, which only its models of images have.
        Constant("use_mrope", False, write=False),
        Fixed("layer.mixer.qkv_bias", True),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors((*LLAMA_WEIGHTS, *QKV_BIASES), JUNK),
)
