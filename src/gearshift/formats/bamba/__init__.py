"""Bamba: Mamba-2 in most layers, attention that rotates half of each head in the others."""

from gearshift.formats.bamba.derived import DerivedKeys
from gearshift.formats.common import (
    ALIASES,
    ANY_MODEL,
    ATTENTION_DROPOUT,
    ATTENTION_WEIGHTS,
    DECODER,
    JUNK,
    NORM_EPSILONS,
    OUTPUT_BIAS,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    QKV_BIASES,
    ROTARY_NESTED,
    rotary,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, implied, mapped, optional
from gearshift.formats.layers import BlockKind, LayerNumbers
from gearshift.formats.tensors import Fused, Tensors, Weight

_ROPE = "rope_parameters"
_LAYER = "model.layers.{layer}"
_PROJECTED = ("gate", "x", "b", "c", "dt")
_CONVOLVED = ("x", "b", "c")
_PARTS = ("weight", "bias")

FORMAT = FamilyFormat(
    name="bamba",
    model_type="bamba",
    config_class="transformers.models.bamba.configuration_bamba:BambaConfig",
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    dialect=DerivedKeys(),
    blocks={"mamba": BlockKind("mamba2"), "attention": BlockKind("attention")},
    layers=(LayerNumbers("attn_layer_indices", listed=("attention",), others=("mamba",), null=True),),
    fates=(
        *ANY_MODEL,
        *DECODER,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *rotary(_ROPE, "attention", partial=True),
        optional(f"{_ROPE}.truncate", "attention.mixer.rotary.truncate"),
        Constant("architectures", ["BambaForCausalLM"], same=(None,)),
        ATTENTION_DROPOUT,
        mapped("rms_norm_eps", *NORM_EPSILONS, "mamba.mixer.norm_epsilon"),
        mapped("num_attention_heads", "attention.mixer.heads"),
        mapped("num_key_value_heads", "attention.mixer.kv_heads"),
        implied("head_dim", "attention.mixer.head_dim"),
        mapped("attention_bias", "attention.mixer.qkv_bias", "attention.mixer.output_bias"),
        Fixed("attention.mixer.type", "attention"),
        Fixed("attention.mixer.window", None),
        Fixed("attention.mixer.qk_norm", None),
        Fixed("attention.mixer.qk_norm_across_heads", False),
        Carried("attn_rotary_emb"),
        # Transformers 5.17 to 5.19 write it whatever they rotate; none reads it.
        Carried("partial_rotary_factor", known=(0.5,), why="transformers rotates what 'rope_parameters' say, or 0.5"),
        Fixed("mamba.mixer.type", "mamba2"),
        mapped("mamba_n_heads", "mamba.mixer.heads"),
        mapped("mamba_d_head", "mamba.mixer.head_dim"),
        mapped("mamba_d_state", "mamba.mixer.state_size"),
        mapped("mamba_n_groups", "mamba.mixer.groups", "mamba.mixer.norm_groups"),
        mapped("mamba_d_conv", "mamba.mixer.conv_kernel"),
        mapped("mamba_conv_bias", "mamba.mixer.conv_bias"),
        mapped("mamba_proj_bias", "mamba.mixer.projection_bias"),
        mapped("time_step_limit", "mamba.mixer.time_step_limit"),
        Fixed("mamba.mixer.norm_before_gate", False),
        Carried("mamba_expand"),
        # How many tokens a kernel takes at once.
        Carried("mamba_chunk_size"),
        Fixed("layer.mlp.type", "gated"),
        mapped("intermediate_size", "layer.mlp.intermediate_size"),
        mapped("hidden_act", "layer.mlp.activation", "mamba.mixer.activation"),
        mapped("mlp_bias", "layer.mlp.bias"),
        Carried("num_logits_to_keep"),
        Carried("z_loss_coefficient"),
    ),
    tensors=Tensors(
        (
            Weight("model.embed_tokens.weight", "model.embed_tokens.weight"),
            Weight("model.norm.weight", "model.final_layernorm.weight"),
            Weight("lm_head.weight", "lm_head.weight"),
            Weight(f"{_LAYER}.mixer_norm.weight", f"{_LAYER}.input_layernorm.weight"),
            Weight(f"{_LAYER}.mlp_norm.weight", f"{_LAYER}.pre_ff_layernorm.weight"),
            *(
                Weight(f"{_LAYER}.mlp.{name}_proj.{part}", f"{_LAYER}.feed_forward.{name}_proj.{part}")
                for name in ("gate", "up", "down")
                for part in _PARTS
            ),
            *(
                Weight(weight.ours, weight.theirs, kinds=("attention",))
                for weight in (*ATTENTION_WEIGHTS, *QKV_BIASES, *OUTPUT_BIAS)
            ),
            *(
                Fused(
                    tuple(f"{_LAYER}.mixer.{name}_proj.{part}" for name in _PROJECTED), f"{_LAYER}.mamba.in_proj.{part}"
                )
                for part in _PARTS
            ),
            *(
                Fused(
                    tuple(f"{_LAYER}.mixer.{name}_conv.{part}" for name in _CONVOLVED), f"{_LAYER}.mamba.conv1d.{part}"
                )
                for part in _PARTS
            ),
            *(
                Weight(f"{_LAYER}.mixer.{name}", f"{_LAYER}.mamba.{name}", kinds=("mamba",))
                for name in ("A_log", "D", "dt_bias", "norm.weight")
            ),
            *(
                Weight(f"{_LAYER}.mixer.o_proj.{part}", f"{_LAYER}.mamba.out_proj.{part}", kinds=("mamba",))
                for part in _PARTS
            ),
        ),
        JUNK,
    ),
)
