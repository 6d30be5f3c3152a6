"""Llama that sees both ways, for the diffusion of text: masked tokens are filled in (arXiv 2502.09992).

Its modelling code comes with its checkpoints, in transformers 4's layout of a config; Gearshift does not run that code.
"""

from gearshift.formats.common import (
    ALIASES,
    ATTENTION,
    DECODER,
    GATED_MLP,
    HEAD_DIM,
    JUNK,
    LLAMA_WEIGHTS,
    MLP_BIASES,
    NO_QK_NORM,
    OUTPUT_BIAS,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    QKV_BIASES,
    REMOTE_MODEL,
    ROTARY_NESTED,
    remote_code,
)
from gearshift.formats.dialect import OldRotary
from gearshift.formats.documents import GENERATION
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fate, Fixed, Mapped, mapped, optional
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Tensors

_LEAF = "layer.mixer.rotary"
_YARN = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
_NOT_READ = (
    *("mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
)
_ROTARY: tuple[Fate, ...] = (
    Mapped("rope_parameters.rope_type", (f"{_LEAF}.type",), words={"default": "default", "yarn": "yarn"}),
    mapped("rope_parameters.rope_theta", f"{_LEAF}.theta"),
    *(optional(f"rope_parameters.{name}", f"{_LEAF}.{name}") for name in _YARN),
    *(Constant(f"rope_parameters.{name}", None, write=False) for name in _NOT_READ),
    *(Fixed(f"{_LEAF}.{name}", None) for name in _NOT_READ),
    Constant("rope_parameters.partial_rotary_factor", 1.0, same=(None,), write=False),
    Constant("rope_parameters.mrope_section", None, write=False),
    Fixed(f"{_LEAF}.share", 1.0),
)
"""Plain rotary positions and yarn, which are all that its code has."""

FORMAT = FamilyFormat(
    name="diffusion_llama",
    model_type="diffusion_llama",
    config_class="transformers.models.llama.configuration_llama:LlamaConfig",
    own_defaults={"use_cache": False, "mask_token_id": 131072},
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    dialect=OldRotary(),
    needed={GENERATION: "{}\n"},
    blocks={"layer": BlockKind("attention")},
    fates=(
        *REMOTE_MODEL,
        remote_code(
            AutoConfig="configuration_diffusion_llama.DiffusionLlamaConfig",
            AutoModel="modeling_diffusion_llama.DiffusionLlamaModel",
        ),
        *DECODER,
        *GATED_MLP,
        *ATTENTION,
        HEAD_DIM,
        *_ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *NO_QK_NORM,
        Constant("architectures", ["DiffusionLlamaModel"], same=(None,)),
        Carried("mask_token_id"),
        Carried("pretraining_tp"),
        mapped("attention_bias", "layer.mixer.qkv_bias", "layer.mixer.output_bias"),
        mapped("mlp_bias", "layer.mlp.bias"),
        Fixed("layer.mixer.causal", False),
        Fixed("layer.mixer.scale_dim", None),
        Fixed("layer.mixer.window", None),
    ),
    tensors=Tensors((*LLAMA_WEIGHTS, *QKV_BIASES, *OUTPUT_BIAS, *MLP_BIASES), JUNK),
)
