"""What the architectures of GGUF files have in common: keys, which carry the architecture's name, and tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Derived, Fate, Fixed, mapped
from gearshift.formats.gguf.source import GGUFSource
from gearshift.formats.tensors import RotaryPairs, Template, Weight

NAME = "gguf"
TIED, QKV_BIAS, OUTPUT_BIAS, MLP_BIAS = "tied_embeddings", "qkv_bias", "output_bias", "mlp_bias"
"""Keys of our own: GGUF says these by having a tensor or not."""

_BLOCK = "blk.{layer}"
_LAYER = "model.layers.{layer}"
_EXPERTS = "mixtures of experts are not supported"
_IGNORED = ("general.", "tokenizer.", "quantize.", "split.tensors")


def _nothing(config: Mapping[str, Any], source: GGUFSource) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How files of one of llama.cpp's architectures are read."""

    table: FamilyFormat
    implied: Callable[[Mapping[str, Any], GGUFSource], Mapping[str, Any]] = _nothing
    """(metadata, file) -> more keys: what the file says by a tensor, or llama.cpp knows without a key."""


def says_nothing(key: str) -> bool:
    """Whether a key says nothing of the model."""
    return key.startswith(_IGNORED)


def decoder(architecture: str) -> tuple[Fate, ...]:
    """Everything but norms, rotary positions, windows, the scale of attention and what few families do."""
    attention = f"{architecture}.attention"
    return (
        mapped(f"{architecture}.vocab_size", "vocab_size"),
        mapped(f"{architecture}.embedding_length", "hidden_size"),
        mapped(f"{architecture}.block_count", "decoder.num_layers"),
        mapped(f"{architecture}.context_length", "max_positions"),
        mapped(f"{architecture}.feed_forward_length", "layer.mlp.intermediate_size"),
        mapped(f"{attention}.head_count", "layer.mixer.heads"),
        mapped(f"{attention}.head_count_kv", "layer.mixer.kv_heads", default=None),
        mapped(f"{attention}.key_length", "layer.mixer.head_dim", default=None),
        mapped(TIED, "tie_embeddings"),
        mapped(QKV_BIAS, "layer.mixer.qkv_bias"),
        mapped(OUTPUT_BIAS, "layer.mixer.output_bias"),
        mapped(MLP_BIAS, "layer.mlp.bias"),
        Derived(f"{attention}.value_length", "layer.mixer.head_dim"),
        Derived(f"{architecture}.rope.dimension_count", "layer.mixer.head_dim"),
        Constant(f"{attention}.causal", True),
        Constant(f"{architecture}.expert_count", 0, why=_EXPERTS),
        Constant(f"{architecture}.expert_used_count", 0, why=_EXPERTS),
        Constant("split.count", 0, same=(1,), why="join the parts with llama-gguf-split --merge first"),
        Constant("split.no", 0),
        # The tokenizer's: taken from here, as the file has no config beside it.
        Carried("tokenizer.ggml.bos_token_id", "bos_token_id"),
        Carried("tokenizer.ggml.eos_token_id", "eos_token_id"),
        Carried("tokenizer.ggml.padding_token_id", "pad_token_id"),
        Fixed("layer.mixer.type", "attention"),
        Fixed("layer.mixer.qk_norm_across_heads", False),
        Fixed("layer.mixer.dropout", 0.0),
        Fixed("layer.mlp.type", "gated"),
    )


def norm_epsilons(architecture: str, *more: str) -> Fate:
    """The key of the one epsilon that all norms have: those of the model and the blocks, and `more`."""
    key = f"{architecture}.attention.layer_norm_rms_epsilon"
    return mapped(key, "final_norm.epsilon", "layer.norm.epsilon", *more)


def rotary(architecture: str, kind: str = "layer") -> tuple[Fate, ...]:
    """Rotary positions on all channels of a head, of one kind of block or of all."""
    scaling, leaf = f"{architecture}.rope.scaling", f"{kind}.mixer.rotary"
    return (
        mapped(f"{architecture}.rope.freq_base", f"{leaf}.theta", default=10000.0),
        mapped(f"{scaling}.type", f"{leaf}.type", default="default"),
        mapped(f"{scaling}.factor", f"{leaf}.factor", default=None),
        mapped(f"{scaling}.original_context_length", f"{leaf}.original_max_position_embeddings", default=None),
        mapped(f"{scaling}.low_freq_factor", f"{leaf}.low_freq_factor", default=None),
        mapped(f"{scaling}.high_freq_factor", f"{leaf}.high_freq_factor", default=None),
        mapped(f"{scaling}.yarn_beta_fast", f"{leaf}.beta_fast", default=None),
        mapped(f"{scaling}.yarn_beta_slow", f"{leaf}.beta_slow", default=None),
        Constant(f"{scaling}.attn_factor", 1.0),
        Constant(f"{scaling}.yarn_attn_factor", 1.0),
        Constant(f"{scaling}.yarn_ext_factor", 1.0, same=(-1.0,)),
        Constant(f"{scaling}.yarn_log_multiplier", 0.0),
        Constant(f"{scaling}.finetuned", True, same=(False,)),
        *(Fixed(f"{leaf}.{name}", None) for name in ("attention_factor", "mscale", "mscale_all_dim", "truncate")),
        *(Fixed(f"{leaf}.{name}", None) for name in ("short_factor", "long_factor")),
        Fixed(f"{leaf}.share", 1.0),
    )


def weights(*, rotary_pairs: bool = False, qk_norm: bool = False) -> tuple[Template, ...]:
    """The tensors of an architecture. `rotary_pairs`: the two channels of a rotary pair lie side by side in q and k."""
    pairs = [RotaryPairs(heads) if rotary_pairs else None for heads in ("mixer.heads", "mixer.kv_heads")]
    layouts = {"q": pairs[0], "k": pairs[1], "v": None}
    return (
        Weight("model.embed_tokens.weight", "token_embd.weight"),
        Weight(f"{_LAYER}.mixer_norm.weight", f"{_BLOCK}.attn_norm.weight"),
        Weight(f"{_LAYER}.mlp_norm.weight", f"{_BLOCK}.ffn_norm.weight"),
        *(
            weight
            for kind in ("weight", "bias")
            for weight in (
                *(
                    Weight(f"{_LAYER}.mixer.{name}_proj.{kind}", f"{_BLOCK}.attn_{name}.{kind}", layout)
                    for name, layout in layouts.items()
                ),
                Weight(f"{_LAYER}.mixer.o_proj.{kind}", f"{_BLOCK}.attn_output.{kind}"),
                *(
                    Weight(f"{_LAYER}.mlp.{name}_proj.{kind}", f"{_BLOCK}.ffn_{name}.{kind}")
                    for name in ("gate", "up", "down")
                ),
            )
        ),
        *(
            Weight(f"{_LAYER}.mixer.{name}_norm.weight", f"{_BLOCK}.attn_{name}_norm.weight")
            for name in ("qk" if qk_norm else "")
        ),
        Weight("model.norm.weight", "output_norm.weight"),
        Weight("lm_head.weight", "output.weight"),
    )
