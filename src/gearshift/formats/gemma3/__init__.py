"""Gemma 3, the text model: scaled embeddings, norms around both halves of a block, a window in most layers, and RoPE of
its own in those."""

from typing import Any

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION,
    ATTENTION_WEIGHTS,
    DECODER,
    HEAD_DIM,
    LAYER_TYPES,
    MLP_WEIGHTS,
    NO_LORA,
    OUTER_WEIGHTS,
    OUTPUT_BIAS,
    QK_NORM,
    QK_NORMS,
    QKV_BIASES,
    WINDOWED_BLOCKS,
    WINDOWS,
    rotary,
)
from gearshift.formats.dialect import Dialect
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fate, Fixed, Mapped, mapped
from gearshift.formats.tensors import Tensors, Weight
from gearshift.spec import ModelSpec

_ROPE = "transformers.modeling_rope_utils:RopeParameters"
_LAYER = "model.layers.{layer}"
_NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
BIDIRECTIONAL = "use_bidirectional_attention"
"""The key of models that see both ways, as models of embeddings do."""
_WINDOW = "sliding_window"


class BothWays(Dialect):
    """Where a token sees both ways, the config counts a window from end to end. Its class makes ours of it: one half
    of the others, and the token itself."""

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        if not config[BIDIRECTIONAL] or config[_WINDOW] is None:
            return config
        return config | {_WINDOW: 2 * (config[_WINDOW] - 1)}


def _rotary(kind: str) -> tuple[Fate, ...]:
    """The rotary positions of one kind of block."""
    key = f"rope_parameters.{kind}"
    return (
        *rotary(key, kind),
        # Transformers does not look for it within the parameters of a kind of layer: the bounds are always whole.
        Constant(f"{key}.truncate", True, same=(None,), write=False),
        Fixed(f"{kind}.mixer.rotary.truncate", None),
    )


FORMAT = FamilyFormat(
    name="gemma3",
    model_type="gemma3_text",
    config_class="transformers.models.gemma3.configuration_gemma3:Gemma3TextConfig",
    nested={"rope_parameters": None, **{f"rope_parameters.{kind}": _ROPE for kind in WINDOWED_BLOCKS}},
    aliases={
        **ALIASES,
        "rope_scaling": "rope_parameters.full_attention",
        "rope_theta": "rope_parameters.full_attention.rope_theta",
        "rope_local_base_freq": "rope_parameters.sliding_attention.rope_theta",
    },
    dialect=BothWays(),
    blocks=WINDOWED_BLOCKS,
    layers=(LAYER_TYPES,),
    fates=(
        *ANY_MODEL,
        *DECODER,
        *ATTENTION,
        HEAD_DIM,
        *QK_NORM,
        *WINDOWS,
        *(fate for kind in WINDOWED_BLOCKS for fate in _rotary(kind)),
        Constant("architectures", ["Gemma3ForCausalLM"], same=(None,)),
        # Say how layer_types comes about where it is not given.
        Carried("sliding_window_pattern"),
        Carried("_sliding_window_pattern"),
        # Gemma 2's: the attention of Gemma 3 does not read it.
        Carried("attn_logit_softcapping"),
        # A setting of generation.
        Carried("cache_implementation"),
        Mapped(BIDIRECTIONAL, ("layer.mixer.causal",), words={False: True, True: False}, null=False, spelled=True),
        mapped("final_logit_softcapping", "logit_softcap"),
        Mapped("query_pre_attn_scalar", ("layer.mixer.scale_dim",), whole=True),
        mapped("attention_bias", "layer.mixer.qkv_bias", "layer.mixer.output_bias"),
        mapped("intermediate_size", "layer.mlp.intermediate_size"),
        mapped("hidden_activation", "layer.mlp.activation"),
        Fixed("layer.mlp.type", "gated"),
        Fixed("layer.mlp.bias", False),
        Fixed("scale_embeddings", True),
        Fixed("prediction_heads", ()),
        Fixed("final_norm.type", "rms_norm"),
        Fixed("final_norm.zero_centered", True),
        Fixed("layer.norm.type", "rms_norm"),
        Fixed("layer.norm.zero_centered", True),
        Fixed("layer.mixer.qk_norm.zero_centered", True),
        Fixed("layer.norm_placement", "around"),
        Fixed("layer.shared_weights", False),
        NO_LORA,
    ),
    tensors=Tensors(
        (
            *OUTER_WEIGHTS,
            *(Weight(f"{_LAYER}.{ours}.weight", f"{_LAYER}.{theirs}.weight") for ours, theirs in _NORMS.items()),
            *ATTENTION_WEIGHTS,
            *QK_NORMS,
            *QKV_BIASES,
            *OUTPUT_BIAS,
            *MLP_WEIGHTS,
        )
    ),
)
