"""Mistral 7B and its relatives: Llama with one window for all layers, and no biases."""

from gearshift.formats.base import FamilyFormat
from gearshift.formats.families import ALIASES, ANY_MODEL, ATTENTION, DECODER, LLAMA_TENSORS, ROTARY, ROTARY_NESTED
from gearshift.formats.fates import Constant, Fixed, mapped

FORMAT = FamilyFormat(
    name="mistral",
    model_type="mistral",
    config_class="transformers.models.mistral.configuration_mistral:MistralConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    mixer="attention",
    mlp="gated",
    fates=(
        *ANY_MODEL,
        *DECODER,
        *ATTENTION,
        *ROTARY,
        Constant("architectures", ["MistralForCausalLM"], same=(None,)),
        mapped("sliding_window", "layer.mixer.window"),
        Fixed("layer.mixer.qkv_bias", False),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=LLAMA_TENSORS,
)
