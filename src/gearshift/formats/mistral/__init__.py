"""Mistral 7B and its relatives: Llama with one window for all layers, and no biases."""

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    DECODER,
    LLAMA_TENSORS,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    ROTARY,
    ROTARY_NESTED,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Constant, Fixed, mapped
from gearshift.formats.layers import BlockKind

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
        *ATTENTION,
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        Constant("architectures", ["MistralForCausalLM"], same=(None,)),
        mapped("sliding_window", "layer.mixer.window"),
        Fixed("layer.mixer.qkv_bias", False),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=LLAMA_TENSORS,
)
