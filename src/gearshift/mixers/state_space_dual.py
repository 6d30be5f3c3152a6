"""The recurrence of Mamba-2 (state space duality, arXiv 2405.21060): linear attention with a decay a head.

Over a state S [state_size, head_dim] a head, with the paper's C, B and x as queries, keys and values:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Mamba-2 discretises, v = dt x and g = -exp(A_log) dt; discrete Mamba-2 does not, v = x and g comes from the input.
Consecutive value heads share a query and a key head. All arithmetic of the plain paths is in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.chunks import CHUNK_SIZE, ChunkLayout
from gearshift.mixers.kernels import gradients_are_wrong, kernel


def recurrent_state_space_dual(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token.

    query and key [batch, tokens, key_heads, state_size], value [batch, tokens, heads, head_dim], decay (the log decay
    g, not positive) [batch, tokens, heads], initial_state [batch, heads, state_size, head_dim] -> the outputs, shaped
    as `value`, and the last state, in float32.
    """
    share = value.shape[2] // key.shape[2]
    query, key = (x.float().repeat_interleave(share, dim=2) for x in (query, key))
    value, factor = value.float(), decay.float().exp()[..., None, None]
    state = _state(key, value) if initial_state is None else initial_state.float()
    outputs = []
    for token in range(value.shape[1]):
        state = state * factor[:, token] + key[:, token, :, :, None] * value[:, token, :, None]
        outputs.append((query[:, token, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def chunked_state_space_dual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The same in chunks, with few and large matrix products (arXiv 2405.21060, section 6). float32 shapes as above.

    `lengths` are the tokens of each packed document: every document starts from a zero state, and the last state is
    that of the last document. The exponents are summed up for every pair of tokens, never taken apart, so every factor
    is at most one and any decay, however strong, gives a small relative error. Differentiable in everything.
    """
    batch, tokens, heads, head_dim = value.shape
    share = heads // key.shape[2]
    layout = ChunkLayout(lengths or [tokens], chunk_size)
    query, key, value, decay = (layout.chunked(x) for x in (query, key, value, decay[..., None]))

    pairs = _decay_between(decay)
    scores = (query @ key.mT).repeat_interleave(share, 0) * pairs
    query, key = (x.repeat_interleave(share, 0) for x in (query, key))
    from_start = decay.cumsum(-2).exp()
    added = key.mT @ (value * pairs[..., -1, :, None])

    state = value.new_zeros(len(value), key.shape[-1], head_dim)
    state = state if initial_state is None else initial_state.float().flatten(0, 1)
    states = []
    for number, (keep, add) in enumerate(zip(from_start[..., -1:, :].unbind(1), added.unbind(1), strict=True)):
        if number in layout.starts:
            state = torch.zeros_like(state)
        states.append(state)
        state = torch.addcmul(add, keep, state)
    output = scores @ value + (query @ torch.stack(states, dim=1)) * from_start
    return layout.unchunked(output, batch), state.unflatten(0, (batch, heads))


def state_space_dual(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, context: MixContext, state: MixerState | None
) -> Tensor:
    """The outputs, shaped as `value`. Shapes as in `recurrent_state_space_dual`.

    Starts from `state["recurrent"]` and writes it, in float32. Packed documents start from nothing. On CUDA the kernels
    of flash-linear-attention run, in the dtype of the values: ImportError without it. Elsewhere the result is float32.
    """
    if value.is_cuda:
        return _fused(query, key, value, decay, context, state)
    initial = None if state is None else state.get("recurrent")
    with torch.autocast(value.device.type, enabled=False):
        inputs = (query.float(), key.float(), value.float(), decay.float(), initial)
        if value.shape[1] == 1:
            output, final = recurrent_state_space_dual(*inputs)
        else:
            output, final = chunked_state_space_dual(*inputs, context.document_lengths)
    if state is not None:
        state["recurrent"] = final
    return output


def _fused(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, context: MixContext, state: MixerState | None
) -> Tensor:
    # The kernels know no shared heads.
    share = value.shape[2] // key.shape[2]
    query, key = (x.to(value.dtype).repeat_interleave(share, dim=2) for x in (query, key))
    decay = decay.float()
    if not torch.is_grad_enabled():
        name = "simple_gla:fused_recurrent_simple_gla" if value.shape[1] == 1 else "simple_gla:chunk_simple_gla"
    elif gradients_are_wrong(value.device):
        # The kernel for a decay a channel has a backward of its own, which is right.
        name, decay = "gla:chunk_gla", decay[..., None].expand(*decay.shape, key.shape[-1]).contiguous()
    else:
        name = "simple_gla:chunk_simple_gla"
    output, final = kernel(f"fla.ops.{name}")(
        q=query,
        k=key,
        v=value,
        g=decay,
        scale=1.0,
        initial_state=None if state is None else state.get("recurrent"),
        output_final_state=state is not None,
        cu_seqlens=context.cu_seqlens,
    )
    if state is not None:
        state["recurrent"] = final
    return output


def _decay_between(decay: Tensor) -> Tensor:
    """[..., i, j]: exp of the sum of the decays [..., tokens, 1] after token j up to token i; 0 above the diagonal."""
    tokens = decay.shape[-2]
    below = torch.ones(tokens, tokens, dtype=torch.bool, device=decay.device).tril(-1)
    sums = decay.expand(*decay.shape[:-1], tokens).masked_fill(~below, 0).cumsum(-2)
    return sums.exp().tril()


def _state(key: Tensor, value: Tensor) -> Tensor:
    return value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
