"""The architecture `llama`: Llama, Mistral and the many models that llama.cpp converts to it."""

from collections.abc import Mapping
from typing import Any

import torch

from gearshift.formats.common import PLAIN_ATTENTION, PLAIN_BLOCK, PLAIN_MODEL
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Constant, Fixed, mapped
from gearshift.formats.gguf.common import NAME, Architecture, decoder, norm_epsilons, rotary, says_nothing, weights
from gearshift.formats.gguf.source import GGUFSource
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Junk, Tensors

ROPE_FACTORS = "rope_freqs.weight"
# What every Llama from 3.1 on has. A file holds only the factors that come of it.
_LOW_FREQUENCY_FACTOR, _HIGH_FREQUENCY_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192

TABLE = FamilyFormat(
    name=NAME,
    writable=False,
    blocks={"layer": BlockKind("attention")},
    ignored=says_nothing,
    fates=(
        *decoder("llama"),
        *rotary("llama"),
        norm_epsilons("llama"),
        mapped("llama.attention.sliding_window", "layer.mixer.window", default=None),
        Constant("llama.tensor_data_layout", "Meta AI original pth"),
        Fixed("layer.mlp.activation", "silu"),
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        Fixed("layer.mixer.qk_norm", None),
    ),
    tensors=Tensors(
        weights(rotary_pairs=True),
        (Junk(r"rope_freqs\.weight", "its factors are in the config, as RoPE of type llama3"),),
    ),
)


def _rope_factors(config: Mapping[str, Any], source: GGUFSource) -> dict[str, Any]:
    """The RoPE parameters that the file's factors, if it has some, come of. ValueError if they are not Llama 3's."""
    from gearshift.mixers.attention import RotarySpec
    from gearshift.mixers.attention.rotary import frequencies

    if ROPE_FACTORS not in source.schema:
        return {}
    factors = source.read(ROPE_FACTORS).flatten()
    plain = RotarySpec(theta=config.get("llama.rope.freq_base", 10000.0))
    scaled = plain.model_copy(
        update={
            "type": "llama3",
            "factor": round(float(factors.max()), 3),
            "low_freq_factor": _LOW_FREQUENCY_FACTOR,
            "high_freq_factor": _HIGH_FREQUENCY_FACTOR,
            "original_max_position_embeddings": _ORIGINAL_CONTEXT,
        }
    )
    head_dim, positions = 2 * len(factors), torch.zeros(1)
    wanted, unscaled = (
        frequencies(rotary, head_dim, 2 * _ORIGINAL_CONTEXT, positions)[0] for rotary in (scaled, plain)
    )
    if not torch.allclose(unscaled / wanted, factors, rtol=1e-4):
        raise ValueError(
            f"the tensor {ROPE_FACTORS!r} holds factors that are not Llama 3's: use the original checkpoint"
        )
    found = {
        "type": scaled.type,
        "factor": scaled.factor,
        "low_freq_factor": scaled.low_freq_factor,
        "high_freq_factor": scaled.high_freq_factor,
        "original_context_length": scaled.original_max_position_embeddings,
    }
    return {f"llama.rope.scaling.{key}": value for key, value in found.items()}


ARCHITECTURE = Architecture(TABLE, _rope_factors)
