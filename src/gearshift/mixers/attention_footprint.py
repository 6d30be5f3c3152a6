"""What attention functions take in memory on CUDA, and stand-ins for them in transformers' interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gearshift.mixers.attention_function import FLEX
from gearshift.mixers.footprint import Footprint, run_stand_in

STAND_IN = "gearshift_stand_in"
"""The name that the stand-ins go by."""
BLOCK = 128
"""Tokens of a side of the blocks that flex attention's masks are made of."""


@contextmanager
def standing_in_for(name: str) -> Iterator[str]:
    """Within, the attention function that this gives the name of takes as much memory as `name` does on CUDA.

    A function that is plain PyTorch, as `eager` is, stands for itself.
    """
    if name not in (FLEX, "sdpa") and "flash" not in name:
        yield name
        return
    functions, masks = ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    functions[STAND_IN] = partial(_attend, name)
    masks[STAND_IN] = partial(_mask, name)
    try:
        yield STAND_IN
    finally:
        del functions[STAND_IN], masks[STAND_IN]


def _attend(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    declare = partial(_footprint, name=name, window=settings.get("sliding_window"), causal=getattr(module, "is_causal"))  # noqa: B009
    return run_stand_in(declare, query, key, value, mask if name == "sdpa" else None), None


def _footprint(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, name: str, window: int | None, causal: bool
) -> Footprint:
    """query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, tokens, head_dim].

    All keep queries, keys, values, the output and a float32 number a token and head, and take another of those, and the
    gradients of keys and values of every head, in the backward pass; flex attention only those of the heads there are.
    SDPA with a mask repeats keys and values for the heads that share them, and widens the mask to the queries' dtype.
    Flash attention sums the queries' gradient up in float32.
    """
    batch, heads, tokens, _ = query.shape
    shared = heads != key.shape[1]
    wide = (key.numel() + value.numel()) * heads // key.shape[1] * value.element_size()
    repeats = shared and mask is not None
    sums = 4 * batch * heads * tokens
    kept = sums + (wide if repeats else 0)
    if mask is not None:
        kept += mask.numel() * query.element_size()
    output = query.new_empty(batch, tokens, heads, value.shape[-1])
    seen = tokens if window is None else min(window, tokens)
    pairs = tokens * seen if window is not None or not causal else tokens * tokens // 2
    return Footprint(
        outputs=(output,),
        keeps=(query, output) if repeats else (query, key, value, output),
        kept=kept,
        backward=sums
        + (wide if shared and name != FLEX else 0)
        + (4 * query.numel() if name not in (FLEX, "sdpa") else 0),
        flops=2 * batch * heads * pairs * (query.shape[-1] + value.shape[-1]),
    )


def _mask(
    name: str, batch_size: int, q_length: int, kv_length: int, device: torch.device, **rest: Any
) -> Tensor | None:
    """What the mask takes: of flex attention, four tables of numbers of blocks; of SDPA, a byte a pair of tokens."""
    if name == FLEX:
        blocks = -(-q_length // BLOCK) * -(-kv_length // BLOCK)
        return torch.empty(batch_size, 4, blocks, dtype=torch.int32, device=device)
    plain = rest.get("local_size") is None and rest.get("allow_is_causal_skip", False)
    if name != "sdpa" or plain:
        return None
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
