"""Attention as a module, on transformers' attention interface."""

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.attention.rotary import rotate, tables
from gearshift.mixers.base import MixContext, Mixer, MixerState, Sharding
from gearshift.plan import Constant, Initialiser, Normal


class Heads(NamedTuple):
    """What attention's core reads: queries, keys and values, rotated, each [batch, heads, tokens, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attention(Mixer):
    """Causal softmax attention over all tokens before, or over a window of them."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}_proj.{kind}": "column" for name in "qkv" for kind in ("weight", "bias")},
        "o_proj.weight": "row",
        "o_proj.bias": "replicated",
    }

    is_causal = True

    def __init__(self, spec: AttentionSpec, hidden_size: int):
        super().__init__(spec, hidden_size)
        assert spec.head_dim is not None, "a module needs a resolved spec"
        assert spec.kv_heads is not None, "a module needs a resolved spec"
        self.q_proj = nn.Linear(hidden_size, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.heads * spec.head_dim, hidden_size, bias=spec.output_bias)
        # Transformers' attention functions read these from the module they are given.
        self.num_key_value_groups = spec.heads // spec.kv_heads
        self.config = SimpleNamespace(_attn_implementation=None)

    def project(self, hidden: Tensor, context: MixContext) -> Heads:
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.spec.rotary is not None:
            cosine, sine = tables(self.spec.rotary, self.spec.head_dim, hidden.dtype, context)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return Heads(query, key, value)

    def core(self, inputs: Heads, context: MixContext, state: MixerState | None) -> Tensor:
        """The heads' outputs, [batch, tokens, heads, head_dim]."""
        query, key, value = inputs
        if state is not None:
            key, value = state.append("key", key), state.append("value", value)
        name = context.attn_implementation
        self.config._attn_implementation = name
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        output, _ = attend(
            self,
            query,
            key,
            value,
            self._mask(query, key, context),
            scaling=self.spec.head_dim**-0.5,
            dropout=0.0,
            sliding_window=self.spec.window,
            **_packing(context),
        )
        return output

    def features(self, result: Tensor) -> Tensor:
        return result.flatten(2)

    def _mask(self, query: Tensor, key: Tensor, context: MixContext) -> Any:
        """The mask in the form that the attention function wants, made once a forward for equal windows."""
        name, window, seen = context.attn_implementation, self.spec.window, key.shape[2]

        def make() -> Any:
            pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
            if context.documents is not None:
                pattern = and_masks(pattern, packed_sequence_mask_function(context.documents))
            return ALL_MASK_ATTENTION_FUNCTIONS[name](
                batch_size=query.shape[0],
                q_length=context.tokens,
                kv_length=seen,
                q_offset=context.past,
                kv_offset=context.past + context.tokens - seen,
                mask_function=pattern,
                attention_mask=context.padding,
                local_size=window,
                allow_is_causal_skip=context.documents is None,
                dtype=query.dtype,
                device=query.device,
                config=self.config,
            )

        return context.once(("mask", name, window, seen, query.dtype, query.device), make)

    @classmethod
    def initialisers(cls, spec: AttentionSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Normal weights of standard deviation 0.02, zero biases."""
        started: dict[str, Initialiser] = {f"{name}_proj.weight": Normal(std=0.02) for name in "qkvo"}
        biased = ("qkv" if spec.qkv_bias else "") + ("o" if spec.output_bias else "")
        return started | {f"{name}_proj.bias": Constant(0.0) for name in biased}


def _packing(context: MixContext) -> dict[str, Any]:
    """What flash attention is told of packed documents; the other functions have it in their mask."""
    lengths = context.document_lengths
    if lengths is None:
        return {}
    return {
        "cu_seq_lens_q": context.cu_seqlens,
        "cu_seq_lens_k": context.cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
