"""Transformers' attention functions by their names, and flex attention without its copies."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

FLEX = "flex_attention"
NARROWEST = 16
"""Channels of the narrowest heads that flex attention runs: its tiles are as wide."""


def attention_function(name: str) -> Callable[..., tuple[Tensor, Any]]:
    """What transformers' interface calls `name`: (module, query, key, value, mask, **settings) -> (output, _).

    query [batch, heads, tokens, head_dim], output [batch, tokens, heads, head_dim].
    """
    return _flex_attention if name == FLEX else ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


def can_learn(name: str, dropout: float, narrowest: int) -> bool:
    """Whether an attention function learns with `dropout` and heads of `narrowest` channels at least."""
    return name != FLEX or (dropout == 0 and narrowest >= NARROWEST)


def _flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Heads read the keys and values they share where these are, and nothing is copied into another layout.

    Transformers' own repeats them for heads that are no power of two, and copies the output. And what torch.compile
    returns has to lie in order, token by token, for its gradient is brought into that order.
    """
    if dropout > 0:
        raise ValueError(f"{FLEX} has no dropout ({dropout}): choose another attn_implementation, or a dropout of 0")
    by_token = _by_token if torch.compiler.is_compiling() else _compiled()
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return by_token(query, key, value, mask, scaling), None


def _by_token(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> Tensor:
    """Flex attention of what lies token by token, [batch, tokens, heads, head_dim]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = flex_attention(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    assert isinstance(output, Tensor), "nothing but the output was asked for"
    return output.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_by_token)
