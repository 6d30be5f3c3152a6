"""The architecture `qwen2`: Qwen2 and Qwen2.5. Rotary pairs lie half a head apart, as ours."""

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
            *decoder("qwen2"),
            *rotary("qwen2"),
            norm_epsilons("qwen2"),
            Fixed("layer.mlp.activation", "silu"),
            *PLAIN_MODEL,
            *PLAIN_BLOCK,
            *PLAIN_ATTENTION,
            # llama.cpp runs all layers without one, whatever the original had.
            Fixed("layer.mixer.window", None),
            Fixed("layer.mixer.qk_norm", None),
        ),
        tensors=Tensors(weights()),
    )
)
