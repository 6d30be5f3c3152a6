"""OLMo hybrid: Gated DeltaNet in most layers, norms before it, and attention in the others, norms after it."""

from collections.abc import Mapping
from typing import Any

from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION_DROPOUT,
    ATTENTION_WEIGHTS,
    DECODER,
    JUNK,
    MLP_WEIGHTS,
    NO_LORA,
    NORM_EPSILONS,
    OUTER_WEIGHTS,
    OUTPUT_BIAS,
    PLAIN_ATTENTION,
    PLAIN_MODEL,
    QK_NORMS,
    QKV_BIASES,
    ROTARY_NESTED,
    rotary,
)
from gearshift.formats.dialect import Dialect
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, Mapped, Nullable, mapped, optional
from gearshift.formats.layers import BlockKind, LayerTypes
from gearshift.formats.tensors import EvenlySplit, Tensors, Weight
from gearshift.spec import ModelSpec

_ROPE = "rope_parameters"
_LINEAR = ("linear_attention",)
_FULL = ("full_attention",)
_LAYER = "model.layers.{layer}"
_RECURRENT = {
    **{f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvabo"},
    **{f"{name}_conv.weight": f"{name}_conv1d.weight" for name in "qkv"},
    "gate_proj.weight": "g_proj.weight",
    "norm.weight": "o_norm.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
}
_NOTHING = {"rope_theta": None, "rope_type": "default"}


class _NoPositions(Dialect):
    """Without positions `rope_theta` is null, or `rope_parameters` itself, as it was first published.

    The config class takes the latter for positions with the default base, so that we write the former.
    """

    def for_class(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        old = any(raw.get(key) is not None for key in ("rope_theta", "rope_scaling"))
        null = _ROPE in raw and raw[_ROPE] is None and not old
        return {**raw, _ROPE: dict(_NOTHING)} if null else dict(raw)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get(f"{_ROPE}.rope_theta") is not None:
            return dict(values)
        return {key: value for key, value in values.items() if not key.startswith(f"{_ROPE}.")}

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        return config if config.get(_ROPE) else config | {_ROPE: dict(_NOTHING)}


def _norm(kind: str, ours: str, theirs: str) -> Weight:
    return Weight(f"{_LAYER}.{ours}.weight", f"{_LAYER}.{theirs}.weight", kinds=(kind,))


FORMAT = FamilyFormat(
    name="olmo_hybrid",
    model_type="olmo_hybrid",
    config_class="transformers.models.olmo_hybrid.configuration_olmo_hybrid:OlmoHybridConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    dialect=_NoPositions(),
    blocks={"linear_attention": BlockKind("gated_delta_net"), "full_attention": BlockKind("attention")},
    layers=(LayerTypes("layer_types", {"linear_attention": _LINEAR, "full_attention": _FULL}),),
    fates=(
        *ANY_MODEL,
        *DECODER,
        *PLAIN_MODEL,
        *PLAIN_ATTENTION,
        Nullable(_ROPE, "full_attention.mixer.rotary"),
        *rotary(_ROPE, "full_attention"),
        optional(f"{_ROPE}.truncate", "full_attention.mixer.rotary.truncate"),
        Constant("architectures", ["OlmoHybridForCausalLM"], same=(None,)),
        ATTENTION_DROPOUT,
        mapped("rms_norm_eps", *NORM_EPSILONS, "full_attention.mixer.qk_norm.epsilon"),
        mapped("num_attention_heads", "full_attention.mixer.heads"),
        mapped("num_key_value_heads", "full_attention.mixer.kv_heads"),
        mapped("attention_bias", "full_attention.mixer.qkv_bias", "full_attention.mixer.output_bias"),
        mapped("linear_num_key_heads", "linear_attention.mixer.key_heads"),
        mapped("linear_num_value_heads", "linear_attention.mixer.value_heads"),
        mapped("linear_key_head_dim", "linear_attention.mixer.key_dim"),
        mapped("linear_value_head_dim", "linear_attention.mixer.value_dim"),
        mapped("linear_conv_kernel_dim", "linear_attention.mixer.conv_kernel"),
        mapped("linear_allow_neg_eigval", "linear_attention.mixer.negative_eigenvalues"),
        mapped("intermediate_size", "layer.mlp.intermediate_size"),
        mapped("hidden_act", "layer.mlp.activation", "linear_attention.mixer.conv_activation"),
        # How a new model starts.
        *(Carried(f"linear_{name}") for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")),
        Fixed("full_attention.norm_placement", "after"),
        Fixed("linear_attention.norm_placement", "before"),
        Fixed("layer.norm.type", "rms_norm"),
        Fixed("layer.norm.zero_centered", False),
        Fixed("layer.shared_weights", False),
        NO_LORA,
        Fixed("full_attention.mixer.type", "attention"),
        Mapped("head_dim", ("full_attention.mixer.head_dim",), default=None, omit_implied=True),
        Fixed("full_attention.mixer.window", None),
        Fixed("full_attention.mixer.qk_norm.type", "rms_norm"),
        Fixed("full_attention.mixer.qk_norm.zero_centered", False),
        Fixed("full_attention.mixer.qk_norm_across_heads", True),
        Fixed("linear_attention.mixer.type", "gated_delta_net"),
        Fixed("linear_attention.mixer.activation", "silu"),
        Fixed("linear_attention.mixer.norm_epsilon", 1e-5),
        Fixed("layer.mlp.type", "gated"),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors(
        (
            *OUTER_WEIGHTS,
            *MLP_WEIGHTS,
            _norm("linear_attention", "mixer_norm", "attention_layer_norm"),
            _norm("linear_attention", "mlp_norm", "feedforward_layer_norm"),
            _norm("full_attention", "mixer_output_norm", "post_attention_layernorm"),
            _norm("full_attention", "mlp_output_norm", "post_feedforward_layernorm"),
            *(
                Weight(weight.ours, weight.theirs, kinds=_FULL)
                for weight in (*ATTENTION_WEIGHTS, *QK_NORMS, *QKV_BIASES, *OUTPUT_BIAS)
            ),
            *(
                Weight(f"{_LAYER}.mixer.{ours}", f"{_LAYER}.linear_attn.{theirs}", kinds=_LINEAR)
                for ours, theirs in _RECURRENT.items()
            ),
        ),
        JUNK,
        # What transformers saves: it renames norms by parts of their names, and splits convolutions evenly.
        others=(
            _norm("full_attention", "mixer_output_norm", "feedforward_layer_norm"),
            EvenlySplit(
                tuple(f"{_LAYER}.mixer.{name}_conv.weight" for name in "qkv"),
                tuple(f"{_LAYER}.linear_attn.{name}_conv1d.weight" for name in "qkv"),
                _LINEAR,
            ),
        ),
    ),
)
