"""Mistral 7B and its relatives: Llama with one window for all layers, and no biases."""

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    DECODER,
    GATED_MLP,
    HEAD_DIM,
    JUNK,
    LLAMA_WEIGHTS,
    NO_QK_NORM,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    ROTARY,
    ROTARY_NESTED,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Constant, Fixed, mapped
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Tensors

FORMAT = FamilyFormat(
    name="mistral",
    model_type="mistral",
    config_class="transformers.models.mistral.configuration_mistral:MistralConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    blocks={"layer": BlockKind("attention")},
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
        *NO_QK_NORM,
        Constant("architectures", ["MistralForCausalLM"], same=(None,)),
        mapped("sliding_window", "layer.mixer.window"),
        Fixed("layer.mixer.qkv_bias", False),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors(LLAMA_WEIGHTS, JUNK),
)
