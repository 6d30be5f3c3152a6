"""Llama and the many models that are Llamas by architecture (SmolLM2, TinyLlama, Yi, DeepSeek LLM, ...)."""

from gearshift.formats.base import FamilyFormat
from gearshift.formats.families import ALIASES, ANY_MODEL, ATTENTION, DECODER, LLAMA_TENSORS, ROTARY, ROTARY_NESTED
from gearshift.formats.fates import Carried, Constant, Fixed, mapped

FORMAT = FamilyFormat(
    name="llama",
    model_type="llama",
    config_class="transformers.models.llama.configuration_llama:LlamaConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    mixer="attention",
    mlp="gated",
    fates=(
        *ANY_MODEL,
        *DECODER,
        *ATTENTION,
        *ROTARY,
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
    tensors=LLAMA_TENSORS,
)
