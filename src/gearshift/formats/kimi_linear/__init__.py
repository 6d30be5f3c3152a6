"""Kimi Linear: Kimi Delta Attention in most layers, latent attention without positions in the others, experts in nearly
all."""

from gearshift.formats.common import (
    ANY_MODEL,
    ATTENTION_DROPOUT,
    DECODER,
    JUNK,
    MLP_WEIGHTS,
    NORM_EPSILONS,
    NORM_WEIGHTS,
    OUTER_WEIGHTS,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    expert_weights,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, mapped
from gearshift.formats.kimi_linear.published import NAMES, REPEATED, PublishedLayout
from gearshift.formats.layers import BlockKind, LayerTypes
from gearshift.formats.tensors import Shaped, Tensors, Weight

_LAYER = "model.layers.{layer}"
_MIXERS = {"linear": "kimi_delta_attention", "full": "multi_head_latent_attention"}
_MLPS = {"dense": "gated", "sparse": "mixture_of_experts"}
_LINEAR = ("linear_dense", "linear_sparse")
_FULL = ("full_dense", "full_sparse")
_DENSE = ("linear_dense", "full_dense")
_SPARSE = ("linear_sparse", "full_sparse")
_ATTENTION = {
    **{f"{name}.weight": f"{name}.weight" for name in ("q_proj", "o_proj")},
    "o_proj.bias": "o_proj.bias",
    **{f"q_down_proj.{part}": f"q_a_proj.{part}" for part in ("weight", "bias")},
    "q_norm.weight": "q_a_layernorm.weight",
    "q_up_proj.weight": "q_b_proj.weight",
    **{f"kv_down_proj.{part}": f"kv_a_proj_with_mqa.{part}" for part in ("weight", "bias")},
    "kv_norm.weight": "kv_a_layernorm.weight",
    "kv_up_proj.weight": "kv_b_proj.weight",
    **{f"{name}_proj.weight": f"{name}_proj.weight" for name in "kvb"},
    **{f"{name}_conv.weight": f"{name}_conv1d.weight" for name in "qkv"},
    "decay_down_proj.weight": "f_a_proj.weight",
    "decay_up_proj.weight": "f_b_proj.weight",
    "gate_down_proj.weight": "g_a_proj.weight",
    "gate_up_proj.weight": "g_b_proj.weight",
    "norm.weight": "o_norm.weight",
    "dt_bias": "dt_bias",
}
"""Of both mixers, which are under one name there: those that both have are called alike."""
_REMOTE_CODE = {
    "AutoConfig": "configuration_kimi.KimiLinearConfig",
    "AutoModel": "modeling_kimi.KimiLinearModel",
    "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
}
"""The code that the model was published with, which transformers' own classes replace."""


def _of(kinds: tuple[str, ...], leaf: str) -> tuple[str, ...]:
    return tuple(f"{kind}.{leaf}" for kind in kinds)


FORMAT = FamilyFormat(
    name="kimi_linear",
    model_type="kimi_linear",
    config_class="transformers.models.kimi_linear.configuration_kimi_linear:KimiLinearConfig",
    nested={"linear_attn_config": None},
    aliases={"torch_dtype": "dtype", **{theirs: key for key, theirs in NAMES.items()}},
    dialect=PublishedLayout(),
    blocks={f"{mixer}_{mlp}": BlockKind(_MIXERS[mixer], _MLPS[mlp]) for mixer in ("linear", "full") for mlp in _MLPS},
    layers=(
        LayerTypes("layer_types", {"linear_attention": _LINEAR, "full_attention": _FULL}),
        LayerTypes("mlp_layer_types", {"dense": _DENSE, "sparse": _SPARSE}),
    ),
    fates=(
        *(
            fate
            for fate in (*ANY_MODEL, *DECODER)
            if getattr(fate, "key", "") not in ("auto_map", "tie_word_embeddings")
        ),
        # Transformers never ties the head of this family, whatever the key says: checkpoints hold one.
        Carried("tie_word_embeddings"),
        Fixed("tie_embeddings", False, why="transformers never ties the head of this family"),
        Constant("auto_map", None, same=(_REMOTE_CODE,), write=False, why="this is not the code that was published"),
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        Constant("architectures", ["KimiLinearForCausalLM"], same=(None,)),
        ATTENTION_DROPOUT,
        mapped("rms_norm_eps", *NORM_EPSILONS, "layer.mixer.norm_epsilon"),
        *(Fixed(path, _MIXERS["linear"]) for path in _of(_LINEAR, "mixer.type")),
        mapped("linear_num_heads", *_of(_LINEAR, "mixer.heads")),
        mapped("linear_head_dim", *(f"layer.mixer.{name}" for name in ("head_dim", "decay_rank", "gate_rank"))),
        mapped("linear_conv_kernel_dim", "layer.mixer.conv_kernel"),
        Fixed("layer.mixer.gate_activation", "sigmoid"),
        *(Fixed(path, _MIXERS["full"]) for path in _of(_FULL, "mixer.type")),
        mapped("num_attention_heads", *_of(_FULL, "mixer.heads")),
        *(
            mapped(name, f"layer.mixer.{name}")
            for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        ),
        mapped("attention_bias", "layer.mixer.bias"),
        # The latents' norms do not follow rms_norm_eps.
        Fixed("layer.mixer.norm.epsilon", 1e-6),
        Fixed("layer.mixer.norm.type", "rms_norm"),
        Fixed("layer.mixer.norm.zero_centered", False),
        Fixed("layer.mixer.rotary", None),
        Fixed("layer.mixer.interleaved", False),
        Constant("mla_use_nope", True, why="transformers gives these layers no positions"),
        Carried("rope_theta"),
        Carried("rope_scaling"),
        mapped("hidden_act", "layer.mlp.activation", "layer.mlp.shared.activation", "layer.mixer.conv_activation"),
        *(Fixed(path, "gated") for path in _of(_DENSE, "mlp.type")),
        mapped("intermediate_size", *_of(_DENSE, "mlp.intermediate_size")),
        *(Fixed(path, False) for path in ("layer.mlp.bias", "layer.mlp.shared.bias", "layer.mlp.shared_gate")),
        *(Fixed(path, "mixture_of_experts") for path in _of(_SPARSE, "mlp.type")),
        mapped("moe_intermediate_size", *_of(_SPARSE, "mlp.intermediate_size")),
        mapped("num_local_experts", "layer.mlp.experts"),
        mapped("num_experts_per_tok", "layer.mlp.experts_per_token"),
        mapped("norm_topk_prob", "layer.mlp.normalise"),
        mapped("routed_scaling_factor", "layer.mlp.scaling"),
        mapped("n_group", "layer.mlp.groups"),
        mapped("topk_group", "layer.mlp.groups_per_token"),
        mapped("n_shared_experts", "layer.mlp.shared.intermediate_size"),
        Fixed("layer.mlp.shared.type", "gated"),
        Fixed("layer.mlp.scoring", "sigmoid"),
        Fixed("layer.mlp.correction_bias", True),
        Constant("moe_router_activation_func", "sigmoid"),
        Constant("use_grouped_topk", True),
        Constant("moe_layer_freq", 1),
        Constant("num_nextn_predict_layers", 0, why="its prediction heads are not read"),
        Carried("output_router_logits"),
        Carried("pretraining_tp"),
        # What other keys say too: compared and written by the dialect, but for two that the config class only adds.
        *(Carried(key) for key in REPEATED),
        Carried("head_dim"),
        Carried("qk_head_dim"),
    ),
    tensors=Tensors(
        (
            *OUTER_WEIGHTS,
            *NORM_WEIGHTS,
            *(Weight(f"{_LAYER}.mixer.{ours}", f"{_LAYER}.self_attn.{theirs}") for ours, theirs in _ATTENTION.items()),
            Weight(f"{_LAYER}.mixer.A_log", f"{_LAYER}.self_attn.A_log", Shaped((1, 1, -1, 1))),
            *MLP_WEIGHTS,
            *expert_weights("block_sparse_moe", "w1", "w3", "w2"),
            Weight(f"{_LAYER}.mlp.router.correction_bias", f"{_LAYER}.block_sparse_moe.gate.e_score_correction_bias"),
            *(
                Weight(f"{_LAYER}.mlp.shared.{name}", f"{_LAYER}.block_sparse_moe.shared_experts.{name}")
                for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
            ),
        ),
        JUNK,
        # Transformers saves the gated MLPs under the name that the experts were published with.
        others=tuple(
            Weight(weight.ours, weight.theirs.replace(".mlp.", ".block_sparse_moe.")) for weight in MLP_WEIGHTS
        ),
    ),
)
