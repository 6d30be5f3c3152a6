"""Llama with heads for tokens further ahead (arXiv 2404.19737): each has a block of the last layer's shape.

Its first head is the model's own: the last layer and the norm before the head. Its modelling code comes with its
checkpoints, in transformers 4's layout of a config; Gearshift does not run that code.
"""

from typing import Any

from gearshift.formats.common import (
    ALIASES,
    ATTENTION,
    ATTENTION_WEIGHTS,
    DECODER,
    GATED_MLP,
    HEAD_DIM,
    JUNK,
    MLP_BIASES,
    MLP_WEIGHTS,
    NO_QK_NORM,
    NORM_WEIGHTS,
    OUTPUT_BIAS,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_OUTPUT,
    QKV_BIASES,
    REMOTE_MODEL,
    ROTARY,
    ROTARY_NESTED,
    remote_code,
)
from gearshift.formats.dialect import OldRotary
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, Translated, mapped
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import HEAD, KEY, NEXT_HEAD, Tensors, Weight
from gearshift.spec import ModelSpec, PredictionHeadSpec
from gearshift.spec.placement import MOST_LAYERS

_BLOCK_WEIGHTS = (*NORM_WEIGHTS, *ATTENTION_WEIGHTS, *MLP_WEIGHTS, *QKV_BIASES, *OUTPUT_BIAS, *MLP_BIASES)
_WEIGHTS = (
    Weight("model.embed_tokens.weight", "model.embed_tokens.weight"),
    Weight("lm_head.weight", "lm_head.weight"),
    Weight("model.norm.weight", "model.mtp_norms.0.weight"),
    Weight(f"model.prediction_heads.{HEAD}.norm.weight", f"model.mtp_norms.{NEXT_HEAD}.weight"),
    *_BLOCK_WEIGHTS,
    *(
        Weight(
            weight.ours.replace(f"model.layers.{KEY}", f"model.prediction_heads.{HEAD}.block"),
            weight.theirs.replace(f"model.layers.{KEY}", f"model.mtp_heads.{HEAD}"),
        )
        for weight in _BLOCK_WEIGHTS
    ),
)


def _read_heads(value: Any, spec: ModelSpec) -> tuple[PredictionHeadSpec, ...]:
    """The heads beside the first, where `value` counts all."""
    if type(value) is not int or not 0 < value <= MOST_LAYERS:
        raise ValueError(f"'prediction_heads' counts the heads, the usual one included, and cannot be {value!r}")
    return (PredictionHeadSpec(block=spec.decoder.layers[-1], norm=spec.final_norm),) * (value - 1)


def _write_heads(spec: ModelSpec) -> int:
    alike = PredictionHeadSpec(block=spec.decoder.layers[-1], norm=spec.final_norm)
    for number, head in enumerate(spec.prediction_heads):
        if head != alike:
            raise LookupError(f"prediction head {number} has another block than the last layer, or another norm")
    return 1 + len(spec.prediction_heads)


FORMAT = FamilyFormat(
    name="mtp_llama",
    model_type="mtp_llama",
    # Its own class has the same keys and defaults, and `prediction_heads`.
    config_class="transformers.models.llama.configuration_llama:LlamaConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    dialect=OldRotary(),
    blocks={"layer": BlockKind("attention")},
    fates=(
        *REMOTE_MODEL,
        remote_code(
            AutoConfig="configuration_mtp_llama.MTPLlamaConfig",
            AutoModel="modeling_mtp_llama.MTPLlamaModel",
            AutoModelForCausalLM="modeling_mtp_llama.MTPLlamaForCausalLM",
        ),
        Translated("prediction_heads", "prediction_heads", _read_heads, _write_heads, default=1),
        *DECODER,
        *GATED_MLP,
        *ATTENTION,
        HEAD_DIM,
        *ROTARY,
        *PLAIN_OUTPUT,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *NO_QK_NORM,
        Constant("architectures", ["MTPLlamaForCausalLM"], same=(None,)),
        Carried("pretraining_tp"),
        mapped("attention_bias", "layer.mixer.qkv_bias", "layer.mixer.output_bias"),
        mapped("mlp_bias", "layer.mlp.bias"),
        Fixed("layer.mixer.window", None),
    ),
    tensors=Tensors(_WEIGHTS, JUNK),
)
