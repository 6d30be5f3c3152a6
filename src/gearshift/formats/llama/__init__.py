"""Llama and the many models that are Llamas by architecture (SmolLM2, TinyLlama, Yi, DeepSeek LLM, ...)."""

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    DECODER,
    GATED_MLP,
    HEAD_DIM,
    JUNK,
    LLAMA_WEIGHTS,
    MLP_BIASES,
    NO_QK_NORM,
    OUTPUT_BIAS,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    QKV_BIASES,
    ROTARY,
    ROTARY_NESTED,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, mapped
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Tensors

FORMAT = FamilyFormat(
    name="llama",
    model_type="llama",
    config_class="transformers.models.llama.configuration_llama:LlamaConfig",
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
        Constant("architectures", ["LlamaForCausalLM"], same=(None,)),
        mapped("attention_bias", "layer.mixer.qkv_bias", "layer.mixer.output_bias"),
        mapped("mlp_bias", "layer.mlp.bias"),
        # Once the number of slices that projections were computed in; transformers ignores it.
        Carried("pretraining_tp"),
        # What SmolLM2's configs hold: the first is always true, the second says how rotary pairs lie in a head.
        Constant("is_llama_config", True, write=False),
        Constant("rope_interleaved", False, write=False),
        Fixed("layer.mixer.window", None),
    ),
    tensors=Tensors((*LLAMA_WEIGHTS, *QKV_BIASES, *OUTPUT_BIAS, *MLP_BIASES), JUNK),
)
