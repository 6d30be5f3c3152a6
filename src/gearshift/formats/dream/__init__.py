"""Dream (arXiv 2508.15487): a Qwen2 that sees both ways and is trained to fill in masked tokens.

Its modelling code comes with its checkpoints, in transformers 4's layout of a config; Gearshift does not run that code.
"""

from gearshift.formats.common import (
    ALIASES,
    ATTENTION,
    DECODER,
    GATED_MLP,
    JUNK,
    LLAMA_WEIGHTS,
    NO_QK_NORM,
    PLAIN_BLOCK,
    PLAIN_MODEL,
    QKV_BIASES,
    REMOTE_MODEL,
    ROTARY,
    ROTARY_NESTED,
    remote_code,
)
from gearshift.formats.dialect import OldRotary
from gearshift.formats.documents import GENERATION
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Fixed, computed
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Tensors

FORMAT = FamilyFormat(
    name="dream",
    model_type="dream",
    # Its own class has these keys, but for `layer_types`.
    config_class="transformers.models.qwen2.configuration_qwen2:Qwen2Config",
    own_defaults={"use_cache": False, "mask_token_id": 151666},
    nested=ROTARY_NESTED,
    aliases=ALIASES,
    dialect=OldRotary(),
    needed={GENERATION: "{}\n"},
    blocks={"layer": BlockKind("attention")},
    fates=(
        *REMOTE_MODEL,
        remote_code(AutoConfig="configuration_dream.DreamConfig", AutoModel="modeling_dream.DreamModel"),
        *DECODER,
        *GATED_MLP,
        *ATTENTION,
        computed("layer.mixer.head_dim"),
        *ROTARY,
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *NO_QK_NORM,
        Constant("architectures", ["DreamModel"], same=(None,)),
        # Fast-LLM's name for it, and that of the model's authors, who also say that it is not Qwen2-VL.
        Carried("model_type", known=("dream", "Dream")),
        Carried("use_mrope", known=(False,)),
        Carried("mask_token_id"),
        # The model has no windows, whatever these say.
        Carried("use_sliding_window"),
        Carried("sliding_window", null=True),
        Carried("max_window_layers"),
        Carried("layer_types"),
        Fixed("layer.mixer.causal", False),
        Fixed("layer.mixer.scale_dim", None),
        Fixed("layer.mixer.window", None),
        Fixed("layer.mixer.qkv_bias", True),
        Fixed("layer.mixer.output_bias", False),
        Fixed("layer.mlp.bias", False),
    ),
    tensors=Tensors((*LLAMA_WEIGHTS, *QKV_BIASES), JUNK),
)
