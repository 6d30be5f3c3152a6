"""Which tokens a token sees, in the form that transformers' attention functions want."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from gearshift.mixers.base import MixContext


def attention_mask(
    query: Tensor, seen: int, context: MixContext, window: int | None = None, causal: bool = True
) -> Any:
    """The mask for `query` [batch, heads, tokens, head_dim] over the last `seen` tokens, made once a forward.

    A token sees the `window` tokens up to itself (and as many from itself on, if not `causal`), within its document.
    """
    name = context.attn_implementation

    def make() -> Any:
        pattern = _pattern(window, causal)
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
            allow_is_causal_skip=causal and context.documents is None,
            dtype=query.dtype,
            device=query.device,
            config=SimpleNamespace(_attn_implementation=name),
        )

    return context.once(("mask", name, window, causal, seen, query.dtype, query.device), make)


def packing(context: MixContext) -> dict[str, Any]:
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


def _pattern(window: int | None, causal: bool) -> Any:
    if window is None:
        return causal_mask_function if causal else bidirectional_mask_function
    if causal:
        return sliding_window_causal_mask_function(window)
    return sliding_window_bidirectional_mask_function(window - 1)  # transformers counts the distance
