"""The recurrence of Mamba (arXiv 2312.00752): every channel has a state of its own, each number with its own decay.

Over a state h [channels, state_size], with A negative and steps dt positive (equation 2a, discretised as in section 3):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t

B and C are shared by groups of consecutive channels. All arithmetic of the plain paths is in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.chunks import ChunkLayout
from gearshift.mixers.kernels import kernel

SCAN = "mamba_ssm.ops.selective_scan_interface:selective_scan_fn"
CHUNK_SIZE = 32
"""Tokens of a chunk, a power of two: all chunks go token by token at once, then one chunk follows the other. On a CPU
32, 64 and 128 are equally fast for 1,024 tokens."""
RESET = 1e20
"""A step after which no state is left: exp(-1e20 exp(A_log)) is zero for every A_log above -41."""


def recurrent_selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token.

    x and step (dt) [batch, tokens, channels], rate (A) [channels, state_size], b and c [batch, tokens, groups,
    state_size], initial_state [batch, channels, state_size] -> the outputs, shaped as `x`, and the last state, float32.
    """
    x, step, rate, b, c = (tensor.float() for tensor in (x, step, rate, b, c))
    b, c = (tensor.repeat_interleave(x.shape[2] // b.shape[2], dim=2) for tensor in (b, c))
    state = x.new_zeros(x.shape[0], *rate.shape) if initial_state is None else initial_state.float()
    outputs = []
    for token in range(x.shape[1]):
        written = (step[:, token] * x[:, token])[..., None] * b[:, token]
        state = (step[:, token, :, None] * rate).exp() * state + written
        outputs.append((state * c[:, token]).sum(-1))
    return torch.stack(outputs, dim=1), state


def chunked_selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The same in chunks, with few and large operations. float32, shapes as above.

    All chunks run from a zero state at once; what is left of the state that a chunk starts from is added afterwards.
    Steps are only added up and no factor is above one, so any decay gives a small relative error.
    `lengths` are the tokens of each packed document: every document starts from a zero state, and the last state is
    that of the last document. Differentiable in everything.
    """
    batch, tokens, channels = x.shape
    groups = b.shape[2]
    layout = ChunkLayout(lengths or [tokens], chunk_size)
    x, step = (tensor.unflatten(-1, (groups, -1)) for tensor in (x, step))
    # Each [batch * groups, chunks, tokens of a chunk, channels of a group or state_size].
    x, step, b, c = (layout.chunked(tensor) for tensor in (x, step, b, c))
    rate = rate.unflatten(0, (groups, -1)).repeat(batch, 1, 1)[:, None]

    decays = [(now[..., None] * rate).exp() for now in step.unbind(2)]
    state = x.new_zeros(*x.shape[:2], x.shape[-1], b.shape[-1])
    fresh = []
    for decay, written, at, seen in zip(decays, *(y.unbind(2) for y in (step * x, b, c)), strict=True):
        state = torch.addcmul(decay * state, written[..., None], at[..., None, :])
        fresh.append((state @ seen[..., None]).squeeze(-1))

    initial = None if initial_state is None else initial_state.float().reshape(-1, *state.shape[2:])
    remembered, final = _starts((step.sum(2)[..., None] * rate).exp(), state, initial, layout.starts)
    kept = []
    for decay, seen in zip(decays, c.unbind(2), strict=True):
        remembered = decay * remembered
        kept.append((remembered @ seen[..., None]).squeeze(-1))
    output = torch.stack(fresh, dim=2) + torch.stack(kept, dim=2)
    return layout.unchunked(output, batch).flatten(2), final.reshape(batch, channels, -1)


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, context: MixContext, state: MixerState | None
) -> Tensor:
    """The outputs, shaped as `x`. Shapes as in `recurrent_selective_scan`.

    Starts from `state["recurrent"]` and writes it, in float32. Packed documents start from nothing. On CUDA the kernel
    of mamba-ssm runs, in the dtype of `x`: ImportError without it. Elsewhere the result is float32.
    """
    initial = None if state is None else state.get("recurrent")
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[1] == 1:
            # A few operations on one state, on CUDA too: nothing is gained by a kernel that scans.
            output, final = recurrent_selective_scan(x, step, rate, b, c, initial)
        elif x.is_cuda:
            output, final = _fused(x, step.float(), rate.float(), b, c, initial, context)
        else:
            x, step, rate, b, c = (tensor.float() for tensor in (x, step, rate, b, c))
            output, final = chunked_selective_scan(x, step, rate, b, c, initial, context.document_lengths)
    if state is not None:
        state["recurrent"] = final
    return output.to(x.dtype) if x.is_cuda else output


def _starts(factors: Tensor, added: Tensor, state: Tensor | None, resets: frozenset[int]) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start, shaped as `added` [sequences, chunks, channels, state_size], and the last one.

    state_(n+1) = factors_n state_n + added_n, from zero at the chunks in `resets`.
    """
    state = torch.zeros_like(added[:, 0]) if state is None else state
    states = []
    for number, (factor, add) in enumerate(zip(factors.unbind(1), added.unbind(1), strict=True)):
        if number in resets:
            state = torch.zeros_like(state)
        states.append(state)
        state = factor * state + add
    return torch.stack(states, dim=1), state


def _fused(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, initial: Tensor | None, context: MixContext
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel, which knows neither documents nor a state to start from.

    A token whose step is endless goes in front of each document but the first and clears the state. The scan is linear
    in its first state, so what that one adds is computed apart.
    """
    inputs, places = [x, step.to(x.dtype), b.to(x.dtype), c.to(x.dtype)], None
    if context.cu_seqlens is not None and context.documents is not None:
        places = context.documents[0] + torch.arange(context.tokens, device=x.device)
        total = context.tokens + len(context.cu_seqlens) - 2
        reset = min(RESET, torch.finfo(x.dtype).max)
        fills = (0.0, reset, 0.0, 0.0)
        inputs = [_spread(tensor, places, total, fill) for tensor, fill in zip(inputs, fills, strict=True)]
    over_channels, over_steps = (tensor.transpose(1, 2).contiguous() for tensor in inputs[:2])
    written, read = (tensor.permute(0, 2, 3, 1).contiguous() for tensor in inputs[2:])
    output, final = kernel(SCAN)(over_channels, over_steps, rate, written, read, return_last_state=True)
    output = output.transpose(1, 2)
    if places is not None:
        output = output.index_select(1, places)
    if initial is not None:
        decay = (step.cumsum(1)[..., None] * rate).exp() * initial[:, None]
        by_group = decay.unflatten(2, (c.shape[2], -1)) @ c.float()[..., None]
        output = output.float() + by_group.squeeze(-1).flatten(2)
        final = final + decay[:, -1]
    return output, final.float()


def _spread(x: Tensor, places: Tensor, total: int, fill: float) -> Tensor:
    """[1, tokens, ...] -> [1, total, ...]: the tokens at `places` and `fill` elsewhere."""
    return x.new_full((1, total, *x.shape[2:]), fill).index_copy(1, places, x)
