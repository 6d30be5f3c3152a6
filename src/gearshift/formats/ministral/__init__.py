"""Ministral: Llama with a window in some layers, and no biases. Any such mix can be written as one."""

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
    NO_QK_NORM,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    ROTARY,
    ROTARY_NESTED,
    WINDOWED_BLOCKS,
    WINDOWS,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Constant, Fixed
from gearshift.formats.tensors import Tensors

FORMAT = FamilyFormat(
    name="ministral",
    model_type="ministral",
    config_class="transformers.models.ministral.configuration_ministral:MinistralConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    blocks=WINDOWED_BLOCKS,
    layers=(LAYER_TYPES,),
    fates=(
        *ANY_MODEL,
        *DECODER,
        *GATED_MLP,
        *ATTENTION,
        HEAD_DIM,
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *WINDOWS,
        Constant("architectures", ["MinistralForCausalLM"], same=(None,)),
        *NO_QK_NORM,
        Fixed("layer.mixer.qkv_bias", False),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors(LLAMA_WEIGHTS, JUNK),
)
