"""GGUF files of the llama architecture, in only. The metadata is the config, under llama.cpp's keys."""

from gearshift.formats.common import PLAIN_ATTENTION, PLAIN_BLOCK, PLAIN_MODEL
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Derived, Fixed, Mapped, mapped
from gearshift.formats.layers import BlockKind
from gearshift.formats.tensors import Junk, RotaryPairs, Tensors, Weight

ARCHITECTURE = "llama"
TIED = "tied_embeddings"
"""A key of our own: GGUF says it by leaving the head's tensor out."""
ROPE = "llama.rope"

_BLOCK = "blk.{layer}"
_LAYER = "model.layers.{layer}"
_EXPERTS = "mixtures of experts are not supported"
_UNSET_ROTARY = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
)
_IGNORED = ("general.", "tokenizer.", "quantize.", "split.tensors")


FORMAT = FamilyFormat(
    name="gguf",
    writable=False,
    blocks={"layer": BlockKind("attention")},
    ignored=lambda key: key.startswith(_IGNORED),
    fates=(
        mapped("llama.vocab_size", "vocab_size"),
        mapped("llama.embedding_length", "hidden_size"),
        mapped("llama.block_count", "decoder.num_layers"),
        mapped("llama.context_length", "max_positions"),
        mapped(TIED, "tie_embeddings"),
        mapped("llama.attention.layer_norm_rms_epsilon", "final_norm.epsilon", "layer.norm.epsilon"),
        mapped("llama.feed_forward_length", "layer.mlp.intermediate_size"),
        mapped("llama.attention.head_count", "layer.mixer.heads"),
        mapped("llama.attention.head_count_kv", "layer.mixer.kv_heads", default=None),
        mapped("llama.attention.key_length", "layer.mixer.head_dim", default=None),
        mapped("llama.attention.sliding_window", "layer.mixer.window", default=None),
        mapped("qkv_bias", "layer.mixer.qkv_bias"),
        mapped("output_bias", "layer.mixer.output_bias"),
        mapped("mlp_bias", "layer.mlp.bias"),
        Derived("llama.attention.value_length", "layer.mixer.head_dim"),
        Derived(f"{ROPE}.dimension_count", "layer.mixer.head_dim"),
        Mapped(f"{ROPE}.scaling.type", ("layer.mixer.rotary.type",), default="default"),
        Mapped(f"{ROPE}.freq_base", ("layer.mixer.rotary.theta",), default=10000.0),
        Mapped(f"{ROPE}.scaling.factor", ("layer.mixer.rotary.factor",), default=None),
        Mapped(
            f"{ROPE}.scaling.original_context_length",
            ("layer.mixer.rotary.original_max_position_embeddings",),
            default=None,
        ),
        Mapped(f"{ROPE}.scaling.low_freq_factor", ("layer.mixer.rotary.low_freq_factor",), default=None),
        Mapped(f"{ROPE}.scaling.high_freq_factor", ("layer.mixer.rotary.high_freq_factor",), default=None),
        *(Fixed(f"layer.mixer.rotary.{name}", None) for name in _UNSET_ROTARY),
        Constant(f"{ROPE}.scaling.attn_factor", 1.0),
        Constant(f"{ROPE}.scaling.finetuned", True, same=(False,)),
        Constant("llama.attention.causal", True),
        Constant("llama.expert_count", 0, why=_EXPERTS),
        Constant("llama.expert_used_count", 0, why=_EXPERTS),
        Constant("llama.tensor_data_layout", "Meta AI original pth"),
        Constant("split.count", 0, same=(1,), why="join the parts with llama-gguf-split --merge first"),
        Constant("split.no", 0),
        # The tokenizer's: taken from here, as the file has no config beside it.
        Carried("tokenizer.ggml.bos_token_id", "bos_token_id"),
        Carried("tokenizer.ggml.eos_token_id", "eos_token_id"),
        Carried("tokenizer.ggml.padding_token_id", "pad_token_id"),
        Fixed("layer.mixer.type", "attention"),
        Fixed("layer.mlp.type", "gated"),
        Fixed("layer.mixer.rotary.share", 1.0),
        Fixed("layer.mlp.activation", "silu"),
        *PLAIN_MODEL,
        *PLAIN_BLOCK,
        *PLAIN_ATTENTION,
        Fixed("layer.mixer.qk_norm", None),
        Fixed("layer.mixer.qk_norm_across_heads", False),
    ),
    tensors=Tensors(
        weights=(
            Weight("model.embed_tokens.weight", "token_embd.weight"),
            Weight(f"{_LAYER}.mixer_norm.weight", f"{_BLOCK}.attn_norm.weight"),
            Weight(f"{_LAYER}.mlp_norm.weight", f"{_BLOCK}.ffn_norm.weight"),
            *(
                weight
                for kind in ("weight", "bias")
                for weight in (
                    Weight(f"{_LAYER}.mixer.q_proj.{kind}", f"{_BLOCK}.attn_q.{kind}", RotaryPairs("mixer.heads")),
                    Weight(f"{_LAYER}.mixer.k_proj.{kind}", f"{_BLOCK}.attn_k.{kind}", RotaryPairs("mixer.kv_heads")),
                    Weight(f"{_LAYER}.mixer.v_proj.{kind}", f"{_BLOCK}.attn_v.{kind}"),
                    Weight(f"{_LAYER}.mixer.o_proj.{kind}", f"{_BLOCK}.attn_output.{kind}"),
                    Weight(f"{_LAYER}.mlp.gate_proj.{kind}", f"{_BLOCK}.ffn_gate.{kind}"),
                    Weight(f"{_LAYER}.mlp.up_proj.{kind}", f"{_BLOCK}.ffn_up.{kind}"),
                    Weight(f"{_LAYER}.mlp.down_proj.{kind}", f"{_BLOCK}.ffn_down.{kind}"),
                )
            ),
            Weight("model.norm.weight", "output_norm.weight"),
            Weight("lm_head.weight", "output.weight"),
        ),
        junk=(Junk(r"rope_freqs\.weight", "its factors are in the config, as RoPE of type llama3"),),
    ),
)
