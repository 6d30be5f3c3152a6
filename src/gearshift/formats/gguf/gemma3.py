"""The architecture `gemma3`: the text model of Gemma 3. llama.cpp knows more of it than its files say."""

from collections.abc import Mapping
from typing import Any

from gearshift.formats.common import LAYER_TYPES, NO_LORA, WINDOWED_BLOCKS
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, mapped
from gearshift.formats.gguf.common import NAME, Architecture, decoder, norm_epsilons, rotary, says_nothing, weights
from gearshift.formats.gguf.source import GGUFSource
from gearshift.formats.tensors import Tensors, Weight
from gearshift.spec.placement import MOST_LAYERS

SCALE_DIM = "scale_dim"
"""A key of our own, for what llama.cpp concludes from the size of the model."""
_WINDOW, _PERIOD = "gemma3.attention.sliding_window", "gemma3.attention.sliding_window_pattern"
_USUAL_PERIOD = 6
_LAYERS_OF_27B = 62
_LOCAL = "sliding_attention.mixer.rotary"
_UNSCALED = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
)


def _known_without_keys(config: Mapping[str, Any], source: GGUFSource) -> dict[str, Any]:
    """The kind of every layer, and the scale of attention where it is not that of a head."""
    layers, hidden, heads = (
        config.get(f"gemma3.{key}") for key in ("block_count", "embedding_length", "attention.head_count")
    )
    period = config.get(_PERIOD, _USUAL_PERIOD)
    if type(period) is not int or period < 0:
        raise ValueError(f"{_PERIOD!r} must be a number of layers, not {period!r}")
    found: dict[str, Any] = {}
    if type(layers) is int and 0 < layers <= MOST_LAYERS:
        windowed = [bool(config.get(_WINDOW)) and (period == 0 or (i + 1) % period != 0) for i in range(layers)]
        found["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windowed]
    if layers == _LAYERS_OF_27B and type(hidden) is int and type(heads) is int and heads > 0:
        found[SCALE_DIM] = hidden // heads
    return found


ARCHITECTURE = Architecture(
    FamilyFormat(
        name=NAME,
        writable=False,
        blocks=WINDOWED_BLOCKS,
        layers=(LAYER_TYPES,),
        ignored=says_nothing,
        fates=(
            *decoder("gemma3"),
            *rotary("gemma3", "full_attention"),
            mapped("gemma3.rope.freq_base_swa", f"{_LOCAL}.theta", default=10000.0),
            Fixed(f"{_LOCAL}.type", "default"),
            *(Fixed(f"{_LOCAL}.{name}", None) for name in _UNSCALED),
            Fixed(f"{_LOCAL}.share", 1.0),
            norm_epsilons("gemma3", "layer.mixer.qk_norm.epsilon"),
            mapped(_WINDOW, "sliding_attention.mixer.window", default=None),
            Fixed("full_attention.mixer.window", None),
            # Says how the kinds of the layers come about.
            Carried(_PERIOD),
            mapped(SCALE_DIM, "layer.mixer.scale_dim", default=None),
            mapped("gemma3.final_logit_softcapping", "logit_softcap", default=None),
            Constant("gemma3.attn_logit_softcapping", 0.0),
            Fixed("layer.mlp.activation", "gelu_pytorch_tanh"),
            Fixed("layer.mixer.causal", True),
            Fixed("scale_embeddings", True),
            Fixed("prediction_heads", ()),
            Fixed("layer.norm_placement", "around"),
            Fixed("layer.shared_weights", False),
            NO_LORA,
            # The one of (1 + weight) is part of the weights in these files.
            *(
                fate
                for norm in ("final_norm", "layer.norm", "layer.mixer.qk_norm")
                for fate in (Fixed(f"{norm}.type", "rms_norm"), Fixed(f"{norm}.zero_centered", False))
            ),
        ),
        tensors=Tensors(
            (
                *weights(qk_norm=True),
                Weight("model.layers.{layer}.mixer_output_norm.weight", "blk.{layer}.post_attention_norm.weight"),
                Weight("model.layers.{layer}.mlp_output_norm.weight", "blk.{layer}.post_ffw_norm.weight"),
            )
        ),
    ),
    _known_without_keys,
)
