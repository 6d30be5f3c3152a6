"""The architecture `qwen3`: as `qwen2`, with norms on queries and keys."""

from gearshift.formats.common import PLAIN_ATTENTION, PLAIN_BLOCK, PLAIN_MODEL
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Fixed
from gearshift.formats.gguf.common import NAME, Architecture, decoder, norm_epsilons, rotary, says_nothing, weights
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Tensors

ARCHITECTURE = Architecture(
    FamilyFormat(
        name=NAME,
        writable=False,
        blocks={"layer": BlockKind("attention")},
        ignored=says_nothing,
        fates=(
            *decoder("qwen3"),
            *rotary("qwen3"),
            norm_epsilons("qwen3", "layer.mixer.qk_norm.epsilon"),
            Fixed("layer.mlp.activation", "silu"),
            *PLAIN_MODEL,
            *PLAIN_BLOCK,
            *PLAIN_ATTENTION,
            # llama.cpp runs all layers without one, whatever the original had.
            Fixed("layer.mixer.window", None),
            Fixed("layer.mixer.qk_norm.type", "rms_norm"),
            Fixed("layer.mixer.qk_norm.zero_centered", False),
        ),
        tensors=Tensors(weights(qk_norm=True)),
    )
)
