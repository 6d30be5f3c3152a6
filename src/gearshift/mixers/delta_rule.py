"""The gated delta rule, by which Gated DeltaNet and Kimi Delta Attention write to and read from a matrix.

Both are one recurrence over a state S [key_dim, value_dim] a head (arXiv 2412.06464, equation 10; arXiv 2510.26692,
equation 1):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t / sqrt(key_dim)

The log decay g_t is one number a head in Gated DeltaNet and one a key channel in Kimi Delta Attention, so here its last
dimension is 1 or key_dim. Queries and keys have unit length. Consecutive value heads share a query and a key head.
All arithmetic is in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.chunked_delta_rule import chunked_delta_rule

NORM_EPSILON = 1e-6
"""Added to the squared length of queries and keys before they are divided by it; what the CUDA kernels add."""


def log_decay(raw: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g = -exp(A_log) softplus(raw + dt_bias), float32, never positive.

    raw [batch, tokens, heads, channels], a_log [heads], dt_bias [heads * channels] -> the shape of `raw`; channels is 1
    for a decay a head and key_dim for a decay a channel.
    """
    rate = a_log.float().exp()[:, None]
    return -rate * F.softplus(raw.float() + dt_bias.float().view(raw.shape[-2:]))


def recurrent_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token.

    query and key [batch, tokens, key_heads, key_dim] of any length (they are normalised here), value [batch, tokens,
    heads, value_dim], decay (the log decay g) [batch, tokens, heads, 1 or key_dim], beta [batch, tokens, heads],
    initial_state [batch, heads, key_dim, value_dim] -> the outputs, shaped as `value`, and the last state, in float32.
    """
    query, key = _normalised(query, key, heads=value.shape[2])
    value, beta = value.float(), beta.float()[..., None]
    factor = decay.float().exp()[..., None]
    state = _state(key, value) if initial_state is None else initial_state.float()
    outputs = []
    for token in range(value.shape[1]):
        k = key[:, token, :, None]
        state = state * factor[:, token]
        remembered = (k @ state).squeeze(-2)
        state = state + k.mT @ (beta[:, token] * (value[:, token] - remembered))[..., None, :]
        outputs.append((query[:, token, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    context: MixContext,
    state: MixerState | None,
) -> Tensor:
    """The outputs, shaped as `value`, float32, in plain PyTorch. Shapes as in `recurrent_delta_rule`.

    Starts from `state["recurrent"]` and writes it. Packed documents start from nothing.
    """
    initial = None if state is None else state.get("recurrent")
    with torch.autocast(value.device.type, enabled=False):
        if value.shape[1] == 1:
            output, final = recurrent_delta_rule(query, key, value, decay, beta, initial)
        else:
            query, key = _normalised(query, key, heads=value.shape[2])
            lengths = context.document_lengths
            output, final = chunked_delta_rule(query, key, value.float(), decay.float(), beta.float(), initial, lengths)
    if state is not None:
        state["recurrent"] = final
    return output


def _normalised(query: Tensor, key: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Unit queries, scaled by 1 / sqrt(key_dim), and unit keys, each repeated in place for the heads that share it."""
    query, key = (_unit(x.float()).repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    return query * key.shape[-1] ** -0.5, key


def _unit(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _state(key: Tensor, value: Tensor) -> Tensor:
    return value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
