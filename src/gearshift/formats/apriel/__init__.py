"""Apriel's hybrids (arXiv 2511.02651): Mistral's attention in some layers, recurrent mixers in the others.

The state-space mixers are Mamba with grouped heads, whose dt bias counts twice, and discrete Mamba-2; one section of
the config holds the settings of both. Another holds those of Gated DeltaNet, which its trainer Fast-LLM knows and its
modelling code does not. That code comes with its checkpoints, in transformers 4's layout of a config; Gearshift does
not run it.
"""

from gearshift.formats.apriel.sizes import D_INNER, DISCRETE, HEAD_WIDTH, LAYOUT, SECTION, Sizes
from gearshift.formats.apriel.tensors import TENSORS
from gearshift.formats.common import (
    ALIASES,
    DECODER,
    GATED_MLP,
    HEADS,
    NO_QK_NORM,
    PLAIN_ATTENTION,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    REMOTE_MODEL,
    ROTARY,
    ROTARY_NESTED,
    remote_code,
)
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fate, Fixed, Mapped, mapped, optional
from gearshift.formats.layers import BlockKind, LayerTypes

_UNSUPPORTED = {
    "i": "a layer that does nothing, without a mixer and without an MLP,",
    "swa": "attention with a window of its own, which neither the format's modelling code nor its trainer loads,",
    "kl": "Kimi Delta Attention, which neither the format's modelling code nor its trainer loads,",
}

_STATE_SPACE: tuple[Fate, ...] = (
    mapped("ssm_cfg.d_state", "mamba.mixer.state_size", "discrete.mixer.state_size", default=64),
    mapped("ssm_cfg.d_conv", "mamba.mixer.conv_kernel", "discrete.mixer.conv_kernel", default=4),
    mapped("ssm_cfg.conv_bias", "mamba.mixer.conv_bias", "discrete.mixer.conv_bias", default=True),
    mapped("ssm_cfg.bias", "mamba.mixer.projection_bias", "discrete.mixer.projection_bias", default=False),
    Mapped("ssm_cfg.d_inner", ("mamba.mixer.inner_size",), default=D_INNER, spelled=True),
    Carried("ssm_cfg.expand"),
    # Neither changes what a trained model computes.
    *(Carried(f"ssm_cfg.{name}") for name in ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")),
    Carried("ssm_cfg.chunk_size"),
)
"""Settings that both state-space mixers read, and those that none reads."""

_MAMBA: tuple[Fate, ...] = (
    Fixed("mamba.mixer.type", "mamba"),
    Fixed("mamba.mixer.projection", "grouped"),
    Mapped("ssm_cfg.d_xb", ("mamba.mixer.xb_size",), default=None, spelled=True),
    Mapped("ssm_cfg.dt_rank", ("mamba.mixer.dt_rank",), default="auto", spelled=True),
    mapped("ssm_cfg.repeat_kv_before_conv", "mamba.mixer.repeat_kv_before_conv", default=True),
    Constant("ssm_cfg.dt_proj_bias", True),
    Fixed("mamba.mixer.dt_bias", True),
    Fixed("mamba.mixer.doubled_dt_bias", True),
    Fixed("mamba.mixer.norm", None),
    Fixed("mamba.mixer.activation", "silu"),
)

_DISCRETE: tuple[Fate, ...] = (
    Fixed("discrete.mixer.type", "discrete_mamba2"),
    mapped("ssm_cfg.n_v_heads", "discrete.mixer.value_heads", default=32),
    mapped("ssm_cfg.n_qk_heads", "discrete.mixer.key_heads", default=32),
    mapped(HEAD_WIDTH, "discrete.mixer.head_dim"),
    Mapped(
        "ssm_cfg.activation",
        ("discrete.mixer.activation",),
        default="identity",
        words={"identity": "linear", "silu": "silu", "swish": "silu"},
        spelled=True,
    ),
)

_GATED_DELTA_NET: tuple[Fate, ...] = (
    Fixed("gdn.mixer.type", "gated_delta_net"),
    *(
        optional(f"linear_attn_config.gdn_{theirs}", f"gdn.mixer.{ours}")
        for theirs, ours in {
            "num_key_heads": "key_heads",
            "num_value_heads": "value_heads",
            "key_head_dim": "key_dim",
            "value_head_dim": "value_dim",
            "linear_conv_kernel_size": "conv_kernel",
        }.items()
    ),
    # The trainer's own defaults, whatever rms_norm_eps says of the other norms.
    Fixed("gdn.mixer.norm_epsilon", 1e-5),
    Fixed("gdn.mixer.activation", "silu"),
    Fixed("gdn.mixer.conv_activation", "silu"),
    Fixed("gdn.mixer.negative_eigenvalues", False),
    # Of mixers for a server only, which no layer here has.
    *(Carried(f"linear_attn_config.{name}") for name in ("head_dim", "num_heads", "short_conv_kernel_size")),
)

FORMAT = FamilyFormat(
    name="apriel",
    model_type="apriel_hybrid_ssm",
    # Its own class is this one with the keys of the layout and of the state-space mixers.
    config_class="transformers.models.mistral.configuration_mistral:MistralConfig",
    nested={**ROTARY_NESTED, SECTION: None, "linear_attn_config": None},
    aliases=ALIASES,
    dialect=Sizes(),
    blocks={
        "attention": BlockKind("attention"),
        "mamba": BlockKind("mamba"),
        "discrete": BlockKind("discrete_mamba2"),
        "gdn": BlockKind("gated_delta_net"),
    },
    layers=(
        LayerTypes(
            LAYOUT,
            {"t": ("attention",), "m2": ("mamba",), DISCRETE: ("discrete",), "gdn": ("gdn",)},
            unsupported=_UNSUPPORTED,
        ),
        # A server's names for the same, which the family's own class always writes.
        LayerTypes(
            "layer_types",
            {
                "full_attention": ("attention",),
                "mamba2": ("mamba",),
                "discrete_mamba2": ("discrete",),
                "gated_delta_net": ("gdn",),
            },
            optional=True,
        ),
    ),
    fates=(
        *REMOTE_MODEL,
        remote_code(
            AutoConfig="configuration_apriel_hybrid_ssm.AprielHybridSSMConfig",
            AutoModel="modeling_apriel_hybrid_ssm.AprielHybridSSMModel",
            AutoModelForCausalLM="modeling_apriel_hybrid_ssm.AprielHybridSSMForCausalLM",
        ),
        *DECODER,
        *GATED_MLP,
        *HEADS,
        Fixed("attention.mixer.type", "attention"),
        mapped("head_dim", "attention.mixer.head_dim"),
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        *NO_QK_NORM,
        Constant("architectures", ["AprielHybridSSMForCausalLM"], same=(None,)),
        mapped("sliding_window", "attention.mixer.window"),
        Fixed("layer.mixer.qkv_bias", False),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
        *_STATE_SPACE,
        *_MAMBA,
        *_DISCRETE,
        *_GATED_DELTA_NET,
    ),
    tensors=TENSORS,
)
