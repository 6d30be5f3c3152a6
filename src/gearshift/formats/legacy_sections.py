"""The sections of the older layout in which a model is `blocks`, each with all its settings side by side.

Read only. The fields and what their absence means are those of `docs/migrating.md`.
"""

from collections.abc import Mapping
from typing import Any

from gearshift.formats.fates import Constant, Fixed, Mapped, mapped
from gearshift.formats.rotary_sections import LLAMA3, PLAIN, YARN
from gearshift.formats.sections import (
    Inner,
    Named,
    Repeated,
    Section,
    SectionFate,
    Stated,
    Values,
    key_of,
    used_blocks,
    whole,
)
from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.discrete_mamba2 import DiscreteMamba2Spec
from gearshift.mixers.mamba import MambaSpec
from gearshift.mixers.mamba2 import Mamba2Spec
from gearshift.mlps.gated import GatedMLPSpec
from gearshift.mlps.plain import PlainMLPSpec
from gearshift.spec import BlockSpec, DecoderSpec, LoraSpec, MixerSpec, ModelSpec

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
    "sigmoid": "sigmoid",
    "identity": "linear",
}


def _unused(*keys: str) -> tuple[Stated, ...]:
    """Keys that a section knows and has no use for."""
    return tuple(Stated(key) for key in keys)


_NORM_ALIASES = {
    "rms_norm_eps": "normalization.epsilon",
    "norm_epsilon": "normalization.epsilon",
    "normalization.eps": "normalization.epsilon",
}


def _norm(path: str, epsilon: Any, zero_centered: Any) -> tuple[SectionFate, ...]:
    return (
        Constant("normalization.type", "rms_norm", why="there is no other norm"),
        *_unused("normalization.implementation", "normalization.initialization_range"),
        mapped("normalization.epsilon", f"{path}.epsilon", default=epsilon),
        mapped("normalization.zero_centered", f"{path}.zero_centered", default=zero_centered),
        Fixed(f"{path}.type", "rms_norm"),
    )


def _biases(values: Values, *more: str) -> bool:
    """Whether `add_linear_biases` speaks of a projection: it is a switch, or a word for some of them."""
    said = values["add_linear_biases"]
    if said not in (True, False, "everywhere", "nowhere", "only_attn_qkv"):
        raise ValueError(f"'add_linear_biases' is {said!r}: known are true, false, everywhere, nowhere, only_attn_qkv")
    return said in (True, "everywhere", *more)


def _kv_heads(values: Values) -> Any:
    """The number of key and value heads where no key says it."""
    match values["attention_type"]:
        case "mqa":
            return 1
        case "gqa":
            raise ValueError("attention_type 'gqa' needs the number of key and value heads: set num_kv_heads")
    return values["num_heads"]


def _check_attention_type(values: Values) -> str | None:
    kind, heads, kv_heads = (values[key] for key in ("attention_type", "num_heads", "num_kv_heads"))
    if kind not in (None, "mha", "gqa", "mqa"):
        return f"{kind!r} is no type of attention: known are 'mha', 'gqa', 'mqa'"
    wanted = {"mha": heads, "mqa": 1}.get(kind, kv_heads)
    if kv_heads != wanted:
        return f"{kind!r} has {wanted} key and value heads, but 'num_kv_heads' is {kv_heads!r}"
    return None


ATTENTION = Section(
    "attention of a legacy block",
    AttentionSpec,
    (
        Fixed("type", "attention"),
        mapped("num_heads", "heads"),
        Stated("attention_type", check=_check_attention_type),
        mapped("num_kv_heads", "kv_heads", default=_kv_heads),
        mapped("head_dim", "head_dim", default=None),
        mapped("sliding_window", "window", default=None),
        mapped("causal", "causal", default=True),
        mapped("qkv_bias", "qkv_bias", default=lambda values: _biases(values, "only_attn_qkv")),
        mapped("output_bias", "output_bias", default=_biases),
        Inner(
            "rotary",
            "rotary",
            {"none": None, "default": PLAIN, "llama3": LLAMA3, "yarn": YARN},
            default="default",
            absent={},
        ),
        Fixed("qk_norm", None),
        Fixed("qk_norm_across_heads", False),
        Fixed("dropout", 0.0),
        Fixed("scale_dim", None),
        Constant("attention_softmax_scale_power", 0.5),
        Constant("max_window_layers", None, why="give the layers with a window a block of their own"),
    ),
    aliases={
        "heads": "num_heads",
        "num_attention_heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_groups": "num_kv_heads",
        "head_size": "head_dim",
        "kv_channels": "head_dim",
        "window": "sliding_window",
        "window_size": "sliding_window",
    },
)

_SSM_KEYS = (
    "d_xb",
    "dt_rank",
    "conv_bias",
    "conv_activation",
    "n_qk_heads",
    "n_v_heads",
    "head_dim",
    "n_groups",
    "repeat_kv_before_conv",
)
_SSM_UNUSED = (
    "chunk_size",
    *(f"dt_{name}" for name in ("min", "max", "init", "scale", "init_floor")),
)
_SSM_ALIASES = {
    "d_state": "state_size",
    "expand": "expansion_factor",
    "inner_size": "d_inner",
    "xb_size": "d_xb",
    "d_conv": "conv_kernel_dimension",
    "conv_kernel": "conv_kernel_dimension",
    "num_qk_heads": "n_qk_heads",
    "num_v_heads": "n_v_heads",
}


def _expanded(values: Values) -> int:
    """Channels of the recurrence where no key says how many."""
    return whole(values, "expansion_factor") * whole(values, "hidden_size")


def _head_dim(values: Values) -> int:
    """Channels of a head of discrete Mamba-2."""
    inner, heads = whole(values, "d_inner"), whole(values, "n_v_heads")
    if inner % heads:
        raise ValueError(f"{inner} channels do not divide into {heads} heads: set n_v_heads")
    return inner // heads


def _ssm(variant: str, spec: type[MixerSpec], *fates: SectionFate) -> Section:
    """The section of a state-space block. All variants know all keys, whether they have a use for them or not."""
    said = {key_of(fate) for fate in fates}
    common = (
        Stated("expansion_factor", 2),
        *(() if "d_inner" in said else (Stated("d_inner", _expanded),)),
        mapped("state_size", "state_size", default=16),
        mapped("conv_kernel_dimension", "conv_kernel", default=4),
        mapped("add_bias_linear", "projection_bias", default=False),
    )
    known = said | {fate.key for fate in common}
    return Section(
        f"a legacy {variant} block",
        spec,
        (*common, *fates, *_unused(*(key for key in _SSM_KEYS if key not in known), *_SSM_UNUSED)),
        _SSM_ALIASES,
    )


MAMBA1 = _ssm(
    "mamba1",
    MambaSpec,
    Fixed("type", "mamba"),
    Fixed("projection", "classic"),
    mapped("d_inner", "inner_size", default=_expanded),
    mapped("dt_rank", "dt_rank", default="auto"),
    mapped("conv_bias", "conv_bias", default=False),
    Fixed("xb_size", None),
    Fixed("repeat_kv_before_conv", True),
    Fixed("dt_bias", True),
    Fixed("doubled_dt_bias", False),
    Fixed("norm", None),
    Fixed("activation", "silu"),
)
GROUPED_MAMBA = _ssm(
    "grouped_mamba",
    MambaSpec,
    Fixed("type", "mamba"),
    Fixed("projection", "grouped"),
    mapped("d_inner", "inner_size", default=_expanded),
    mapped("d_xb", "xb_size", default=lambda values: values["hidden_size"]),
    mapped("dt_rank", "dt_rank", default="auto"),
    mapped("conv_bias", "conv_bias", default=True),
    mapped("repeat_kv_before_conv", "repeat_kv_before_conv", default=True),
    Fixed("dt_bias", True),
    Fixed("doubled_dt_bias", True),
    Fixed("norm", None),
    Fixed("activation", "silu"),
)
MAMBA2 = _ssm(
    "mamba2",
    Mamba2Spec,
    Fixed("type", "mamba2"),
    mapped("head_dim", "head_dim", default=64),
    mapped("n_v_heads", "heads", default=lambda values: whole(values, "d_inner") // whole(values, "head_dim")),
    mapped("n_groups", "groups", default=1),
    mapped("conv_bias", "conv_bias", default=True),
    Fixed("activation", "silu"),
    Fixed("time_step_limit", (0.0, None)),
    Fixed("norm_groups", None),
    Fixed("norm_epsilon", 1e-5),
    Fixed("norm_before_gate", False),
)
DISCRETE_MAMBA2 = _ssm(
    "discrete_mamba2",
    DiscreteMamba2Spec,
    Fixed("type", "discrete_mamba2"),
    mapped("n_v_heads", "value_heads", default=32),
    mapped("n_qk_heads", "key_heads", default=lambda values: values["n_v_heads"]),
    mapped("head_dim", "head_dim", default=_head_dim),
    mapped("conv_bias", "conv_bias", default=True),
    Mapped("conv_activation", ("activation",), default="silu", words=_ACTIVATIONS),
)

VARIANTS = {
    "mamba1": MAMBA1,
    "mamba": MAMBA1,
    "grouped_mamba": GROUPED_MAMBA,
    "mamba2": MAMBA2,
    "discrete_mamba2": DISCRETE_MAMBA2,
}


def _kind(raw: Mapping[str, Any]) -> Any:
    """Which mixer a block's keys are of."""
    kind, variant = raw.get("kind", raw.get("type")), raw.get("variant")
    if kind is None:
        kind = "transformer" if variant is None else "ssm"
    if kind == "ssm" and variant is None:
        raise ValueError(f"a block of the kind 'ssm' needs a variant: one of {', '.join(VARIANTS)}")
    if kind == "ssm":
        return variant
    if variant is not None:
        raise ValueError(f"a block of the kind {kind!r} has no variant, but it is {variant!r}")
    return kind


def _gated(raw: Mapping[str, Any]) -> Any:
    """Whether a block's MLP has a gate."""
    return True if raw.get("gated") is None else raw["gated"]


_MLP: tuple[SectionFate, ...] = (
    mapped("intermediate_size", "intermediate_size", default=lambda values: 4 * whole(values, "hidden_size")),
    Stated("gated", True),
    Constant("num_experts", 1),
    Constant("num_shared_experts", 0),
    *_unused("num_experts_per_token", "expert_routing_type"),
)
_MLP_ALIASES = {
    "ffn_hidden_size": "intermediate_size",
    "activation": "activation_type",
    "hidden_act": "activation_type",
}
GATED_MLP = Section(
    "the gated MLP of a legacy block",
    GatedMLPSpec,
    (
        *_MLP,
        Mapped("activation_type", ("activation",), default="silu", words=_ACTIVATIONS),
        Fixed("type", "gated"),
        mapped("mlp_bias", "bias", default=_biases),
    ),
    _MLP_ALIASES,
)
PLAIN_MLP = Section(
    "the plain MLP of a legacy block",
    PlainMLPSpec,
    (
        *_MLP,
        Mapped("activation_type", ("activation",), default="gelu", words=_ACTIVATIONS),
        Fixed("type", "plain"),
        mapped("mlp_bias", "up_bias", "down_bias", default=_biases),
    ),
    _MLP_ALIASES,
)


LORA = Section(
    "the adapters of a legacy block",
    LoraSpec,
    (
        mapped("rank", "rank", default=8),
        mapped("alpha", "alpha", default=8.0),
        mapped("dropout", "dropout", default=0.0),
        mapped("targets", "targets", default=("*",)),
        Constant("freeze_others", True),
    ),
    {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"},
)


def _parent(key: str) -> Any:
    """A default: what the section around this one has under the key."""
    return lambda values: values[key]


BLOCK = Section(
    "a legacy block",
    BlockSpec,
    (
        *_unused("kind", "type", "variant"),
        Repeated("hidden_size", "hidden_size"),
        Stated("add_linear_biases", False),
        *_norm("norm", _parent("normalization.epsilon"), _parent("normalization.zero_centered")),
        Inner("", "mixer", {"transformer": ATTENTION, **VARIANTS}, by=_kind),
        Inner("", "mlp", {True: GATED_MLP, False: PLAIN_MLP}, by=_gated),
        mapped("shared_weights", "shared_weights", default=False),
        Inner("lora", "lora", {"lora": LORA, "none": None}, default="lora", absent={"type": "none"}),
        Fixed("norm_placement", "before"),
    ),
    {"share_weights": "shared_weights", **_NORM_ALIASES},
)


DECODER = Section(
    "the legacy decoder",
    DecoderSpec,
    (
        mapped("num_layers", "num_layers"),
        mapped("block_pattern", "pattern"),
        Named("blocks", "blocks", {"": BLOCK}, by=None, wanted=used_blocks("block_pattern", "num_layers", "blocks")),
    ),
    {"hybrid_block_layout": "block_pattern", "pattern": "block_pattern"},
)
MODEL = Section(
    "the legacy model",
    ModelSpec,
    (
        mapped("vocab_size", "vocab_size", default=49152),
        mapped("hidden_size", "hidden_size", default=1024),
        mapped("max_position_embeddings", "max_positions", default=2048),
        mapped("tie_word_embeddings", "tie_embeddings", default=False),
        *_norm("final_norm", 1e-5, False),
        Inner("", "decoder", {"": DECODER}, by=None),
        Constant("prediction_heads", 1),
        Constant("logits_scale_factor", 1.0),
        Constant("use_position_embeddings", False, why="there are rotary positions only"),
        Fixed("prediction_heads", ()),
        Fixed("scale_embeddings", False),
        Fixed("logit_softcap", None),
    ),
    {"max_positions": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings", **_NORM_ALIASES},
)
