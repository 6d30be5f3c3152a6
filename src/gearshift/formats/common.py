"""The fates that families of transformers have in common."""

from gearshift.formats.fates import Carried, Constant, Fate, Fixed, WeightDtype, mapped, optional
from gearshift.formats.tensors import Junk, Tensors, Weight

ROTARY_NESTED = {"rope_parameters": "transformers.modeling_rope_utils:RopeParameters"}
ALIASES = {
    "rope_scaling": "rope_parameters",
    "rope_theta": "rope_parameters.rope_theta",
    "torch_dtype": "dtype",
}
"""What transformers 4 called the keys of today."""

_REMOTE_CODE = "the checkpoint brings modelling code of its own, which Gearshift does not run"
_QUANTISED = "de-quantise the weights first"

ANY_MODEL: tuple[Fate, ...] = (
    WeightDtype("dtype"),
    Constant("auto_map", None, write=False, why=_REMOTE_CODE),
    Constant("quantization_config", None, write=False, why=_QUANTISED),
    Constant("chunk_size_feed_forward", 0, write=False),
    Constant("is_encoder_decoder", False, write=False),
    Carried("bos_token_id", null=True),
    Carried("eos_token_id", null=True),
    Carried("pad_token_id", null=True),
    Carried("id2label"),
    Carried("label2id"),
    Carried("problem_type"),
)
"""What transformers keeps in the config of every model."""

DECODER: tuple[Fate, ...] = (
    mapped("vocab_size", "vocab_size"),
    mapped("hidden_size", "hidden_size"),
    mapped("num_hidden_layers", "decoder.num_layers"),
    mapped("max_position_embeddings", "max_positions"),
    mapped("tie_word_embeddings", "tie_embeddings"),
    mapped("rms_norm_eps", "final_norm.epsilon", "layer.norm.epsilon"),
    mapped("intermediate_size", "layer.mlp.intermediate_size"),
    mapped("hidden_act", "layer.mlp.activation"),
    Carried("initializer_range"),
    Carried("use_cache"),
    Fixed("layer.mlp.type", "gated"),
)
"""A decoder with gated MLPs."""

PLAIN_MODEL: tuple[Fate, ...] = (
    Fixed("scale_embeddings", False),
    Fixed("logit_softcap", None),
    Fixed("final_norm.type", "rms_norm"),
    Fixed("final_norm.zero_centered", False),
)
"""What few families do outside the blocks."""

PLAIN_BLOCK: tuple[Fate, ...] = (
    Fixed("layer.norm.type", "rms_norm"),
    Fixed("layer.norm.zero_centered", False),
    Fixed("layer.norm_placement", "before"),
    Fixed("layer.shared_weights", False),
)
"""What few families do in a block."""

PLAIN_ATTENTION: tuple[Fate, ...] = (
    Fixed("layer.mixer.causal", True),
    Fixed("layer.mixer.qk_norm", None),
    Fixed("layer.mixer.qk_norm_across_heads", False),
    Fixed("layer.mixer.scale_dim", None),
)
"""What few families do in attention."""

ATTENTION: tuple[Fate, ...] = (
    mapped("num_attention_heads", "layer.mixer.heads"),
    mapped("num_key_value_heads", "layer.mixer.kv_heads"),
    mapped("head_dim", "layer.mixer.head_dim"),
    Constant("attention_dropout", 0.0, same=(None,)),
    Fixed("layer.mixer.type", "attention"),
)
"""Attention with grouped heads."""

ROTARY: tuple[Fate, ...] = (
    mapped("rope_parameters.rope_type", "layer.mixer.rotary.type"),
    mapped("rope_parameters.rope_theta", "layer.mixer.rotary.theta"),
    *(
        optional(f"rope_parameters.{name}", f"layer.mixer.rotary.{name}")
        for name in (
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
    ),
    Constant("rope_parameters.partial_rotary_factor", 1.0, same=(None,), write=False),
    Fixed("layer.mixer.rotary.share", 1.0),
    Constant("rope_parameters.mrope_section", None, write=False),
)
"""Rotary positions on all channels of a head."""

_LAYER = "model.layers.{layer}"

LLAMA_TENSORS = Tensors(
    weights=(
        Weight("model.embed_tokens.weight", "model.embed_tokens.weight"),
        Weight(f"{_LAYER}.mixer_norm.weight", f"{_LAYER}.input_layernorm.weight"),
        *(
            Weight(f"{_LAYER}.mixer.{name}.{kind}", f"{_LAYER}.self_attn.{name}.{kind}")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            for kind in ("weight", "bias")
        ),
        Weight(f"{_LAYER}.mlp_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
        *(
            Weight(f"{_LAYER}.mlp.{name}.{kind}", f"{_LAYER}.mlp.{name}.{kind}")
            for name in ("gate_proj", "up_proj", "down_proj")
            for kind in ("weight", "bias")
        ),
        Weight("model.norm.weight", "model.norm.weight"),
        Weight("lm_head.weight", "lm_head.weight"),
    ),
    junk=(
        Junk(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary frequencies follow from the config"),
        Junk(r"model\.rotary_emb\.inv_freq", "rotary frequencies follow from the config"),
    ),
)
"""The names of Llama's tensors, which most of its relatives kept."""
