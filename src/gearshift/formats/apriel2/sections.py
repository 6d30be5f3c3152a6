"""The sections of an `apriel2` config."""

from dataclasses import replace
from typing import Any

from gearshift.formats.common import ANY_MODEL, NO_LORA
from gearshift.formats.fates import Carried, Constant, Fixed, WeightDtype, mapped, optional
from gearshift.formats.rotary_sections import LLAMA3, PLAIN, YARN
from gearshift.formats.sections import (
    Inner,
    Named,
    Repeated,
    Section,
    SectionFate,
    Stated,
    Values,
    used_blocks,
    whole,
)
from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.gated_delta_net import GatedDeltaNetSpec
from gearshift.mixers.kimi_delta_attention import KimiDeltaAttentionSpec
from gearshift.mixers.mamba import MambaSpec
from gearshift.mlps.gated import GatedMLPSpec
from gearshift.mlps.plain import PlainMLPSpec
from gearshift.spec import BlockSpec, DecoderSpec, ModelSpec, StochasticMixerSpec

_EPSILON = "head.normalization.epsilon"


def _linear_biases(values: Values) -> Any:
    return values["add_linear_biases"]


ROTARY = {"mistral_1d": PLAIN, "default": PLAIN, "llama3": LLAMA3, "yarn": YARN}
"""Its own code runs `mistral_1d` alone; the others are what its trainer writes."""

ATTENTION = Section(
    "apriel2's attention",
    AttentionSpec,
    (
        Fixed("type", "attention"),
        mapped("heads", "heads"),
        mapped("head_groups", "kv_heads", default=lambda values: values["heads"]),
        mapped("head_size", "head_dim"),
        optional("window_size", "window"),
        mapped("causal", "causal", default=True),
        Stated("add_linear_biases", False, write=lambda spec: spec.qkv_bias and spec.output_bias),
        mapped("query_layer.bias.enabled", "qkv_bias", default=_linear_biases),
        Repeated("key_layer.bias.enabled", "query_layer.bias.enabled", default=_linear_biases),
        Repeated("value_layer.bias.enabled", "query_layer.bias.enabled", default=_linear_biases),
        mapped("dense_layer.bias.enabled", "output_bias", default=_linear_biases),
        Inner("rotary", "rotary", ROTARY),
        # Matters where images and text stand in one sequence.
        Carried("cross_document_attention"),
        Fixed("qk_norm", None),
        Fixed("qk_norm_across_heads", False),
        Fixed("dropout", 0.0),
        Fixed("scale_dim", None),
    ),
    defaults={"cross_document_attention": True},
)
GATED_DELTA_NET = Section(
    "apriel2's gdn",
    GatedDeltaNetSpec,
    (
        Fixed("type", "gated_delta_net"),
        mapped("value_heads", "value_heads", default=32),
        mapped("key_heads", "key_heads", default=8),
        mapped("key_head_dim", "key_dim", default=64),
        mapped("value_head_dim", "value_dim", default=64),
        mapped("norm_eps", "norm_epsilon", default=1e-5),
        mapped("convolution_layer.kernel_size", "conv_kernel"),
        mapped("convolution_layer.activation", "conv_activation", default="silu"),
        Fixed("activation", "silu"),
        Fixed("negative_eigenvalues", False),
    ),
)
KIMI_DELTA_ATTENTION = Section(
    "apriel2's kda",
    KimiDeltaAttentionSpec,
    (
        Fixed("type", "kimi_delta_attention"),
        mapped("heads", "heads", default=32),
        mapped("head_dim", "head_dim", "decay_rank", "gate_rank", default=64),
        mapped("convolution_layer.kernel_size", "conv_kernel", default=4),
        Constant("convolution_layer.activation", "silu", write=False),
        Fixed("conv_activation", "silu"),
        mapped("normalization.epsilon", "norm_epsilon", default=1e-5),
        mapped("normalization.activation", "gate_activation", default="silu"),
    ),
)
MAMBA = Section(
    "apriel2's mamba",
    MambaSpec,
    (
        Fixed("type", "mamba"),
        Fixed("projection", "grouped"),
        mapped("state_size", "state_size", default=16),
        Stated("expand", 2),
        mapped("d_inner", "inner_size", default=lambda values: whole(values, "expand") * whole(values, "hidden_size")),
        mapped("d_xb", "xb_size", default=lambda values: values["hidden_size"]),
        mapped("d_conv", "conv_kernel", default=4),
        mapped("dt_rank", "dt_rank", default="auto"),
        mapped("conv_bias", "conv_bias"),
        mapped("dt_proj_bias", "dt_bias"),
        mapped("add_linear_biases", "projection_bias", default=False),
        mapped("repeat_kv_before_conv", "repeat_kv_before_conv", default=True),
        # Its linear layer adds the bias, and its scan adds it again.
        Fixed("doubled_dt_bias", True),
        Fixed("norm", None),
        Fixed("activation", "silu"),
        # How new weights are drawn.
        *(Carried(f"dt_{name}") for name in ("min", "max", "init", "scale", "init_floor")),
    ),
)
MIXERS = {
    "attention": ATTENTION,
    "gdn": GATED_DELTA_NET,
    "kda": KIMI_DELTA_ATTENTION,
    "mamba": MAMBA,
}
STOCHASTIC = Section(
    "apriel2's stochastic mixer",
    StochasticMixerSpec,
    (
        Fixed("type", "stochastic"),
        Named("mixers", "mixers", MIXERS, default="attention"),
        mapped("main_mixer_name", "main", default=lambda values: next(iter(values["mixers"]), None)),
        # How mixers are drawn in training.
        Carried("sampling_strategy"),
        Carried("sampling_weights"),
    ),
    defaults={"sampling_strategy": "uniform"},
)

_MLP: tuple[SectionFate, ...] = (
    Constant("type", "mlp"),
    mapped("intermediate_size", "intermediate_size"),
    mapped("activation", "activation", default="silu"),
)
GATED_MLP = Section(
    "apriel2's gated MLP",
    GatedMLPSpec,
    (
        *_MLP,
        Fixed("type", "gated"),
        # No gated MLP of its code has biases, whatever these say.
        Fixed("bias", False),
        *(Carried(key) for key in ("add_linear_biases", "gate", "layer_1", "layer_2")),
    ),
    defaults={"add_linear_biases": False},
)
PLAIN_MLP = Section(
    "apriel2's MLP without a gate",
    PlainMLPSpec,
    (
        *_MLP,
        Fixed("type", "plain"),
        Stated("add_linear_biases", False, write=lambda spec: spec.up_bias and spec.down_bias),
        mapped("layer_1.bias.enabled", "up_bias", default=_linear_biases),
        mapped("layer_2.bias.enabled", "down_bias", default=_linear_biases),
    ),
)

BLOCK = Section(
    "apriel2's block",
    BlockSpec,
    (
        Inner("mixer", "mixer", {**MIXERS, "stochastic": STOCHASTIC}, default="attention"),
        Inner("mlp", "mlp", {True: GATED_MLP, False: PLAIN_MLP}, by="gated", default=False),
        Constant("normalization.type", "rms_norm"),
        # Its code reads no other epsilon than the head's.
        Repeated("normalization.epsilon", _EPSILON, "norm.epsilon"),
        Fixed("norm.type", "rms_norm"),
        Fixed("norm.zero_centered", False),
        Fixed("norm_placement", "before"),
        Fixed("shared_weights", False),
        replace(NO_LORA, path="lora"),
    ),
)


FIXED_DECODER = Section(
    "apriel2's decoder of one block",
    DecoderSpec,
    (
        mapped("num_blocks", "num_layers"),
        Fixed("pattern", ("block",)),
        Inner("block", "blocks.block", {"": BLOCK}, by=None),
    ),
)
PATTERN_DECODER = Section(
    "apriel2's decoder of several blocks",
    DecoderSpec,
    (
        mapped("num_blocks", "num_layers"),
        mapped("pattern", "pattern"),
        Named("blocks", "blocks", {"": BLOCK}, by=None, wanted=used_blocks("pattern", "num_blocks", "blocks")),
    ),
)


_ANY_MODEL = tuple(
    fate
    for fate in ANY_MODEL
    if isinstance(fate, Constant | Carried | WeightDtype) and fate.key not in ("auto_map", "pad_token_id")
)
"""What transformers keeps in every config, but for what this family does in its own way."""


def model(architecture: str, *more: SectionFate) -> Section:
    """The whole config of a class that calls itself `architecture`, with keys of its own beside the others."""
    return Section(
        "apriel2's config",
        ModelSpec,
        (
            *_ANY_MODEL,
            Constant("architectures", [architecture], same=(None,)),
            mapped("vocab_size", "vocab_size", default=32000),
            mapped("hidden_size", "hidden_size", default=4096),
            mapped("embeddings.max_position_embeddings", "max_positions", default=2048),
            mapped("tie_word_embeddings", "tie_embeddings", default=False),
            Constant("head.normalization.type", "rms_norm"),
            mapped(_EPSILON, "final_norm.epsilon", default=1e-5),
            Inner("decoder", "decoder", {"fixed": FIXED_DECODER, "pattern": PATTERN_DECODER}, default="fixed"),
            Fixed("final_norm.type", "rms_norm"),
            Fixed("final_norm.zero_centered", False),
            Fixed("scale_embeddings", False),
            Fixed("logit_softcap", None),
            Fixed("prediction_heads", ()),
            Carried("pad_token_id"),
            Carried("use_cache"),
            # The files that it names do not come along.
            Stated("auto_map"),
            *more,
        ),
        aliases={"torch_dtype": "dtype"},
        defaults={"bos_token_id": 1, "eos_token_id": 2, "use_cache": True},
    )
