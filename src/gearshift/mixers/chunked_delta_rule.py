"""The gated delta rule in chunks of tokens: the same numbers as token by token, with few and large matrix products.

Within a chunk that starts from the state S, the rows that are written to the state and the outputs are linear in S
(the WY form of arXiv 2406.06484, with decays as in 2412.06464 and 2510.26692):

    (I + L) written = beta v - (beta k decayed) S        output = (q decayed) S + P written

L and P are causal scores sum_c x_ic k_jc exp(g_(j+1)c + ... + g_ic) of the writers beta k and of the queries. Splitting
that exponential into exp(G_i) exp(-G_j) overflows for strong decays, and the difference G_i - G_j of long sums is
inexact. So nothing is ever split: with a decay a head the exponents are summed up for every pair of tokens, with a
decay a channel a chunk is built up by merging neighbouring blocks (`_Block`). Factors are at most one and never
divided by, hence any decay, however strong, gives a small relative error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gearshift.mixers.chunks import CHUNK_SIZE, ChunkLayout


class _Block(NamedTuple):
    """Blocks of neighbouring tokens. [..., tokens, key_dim], where the scores are [..., tokens, tokens]."""

    query: Tensor
    """Decayed from the start of the block, the token's own decay included."""
    writer: Tensor
    """The keys times beta, decayed like the query."""
    key: Tensor
    """Decayed to the end of the block."""
    factor: Tensor
    """[..., 1, key_dim or 1], the decay over the whole block."""
    scores: Tensor
    """P: how much of each written row each query reads."""
    coupling: Tensor
    """L below the diagonal: how much of each written row each later writer takes back. The diagonal is not used."""


def chunked_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The outputs, shaped as `value`, and the last state [batch, heads, key_dim, value_dim].

    All inputs are float32: query (unit length, scaled) and key (unit length) [batch, tokens, heads, key_dim], value
    [batch, tokens, heads, value_dim], decay (the log decay, not positive) [batch, tokens, heads, 1 or key_dim], beta
    [batch, tokens, heads]. `lengths` are the tokens of each packed document: every document starts from a zero state,
    and the last state is that of the last document. Differentiable in everything.
    """
    batch, tokens, heads, value_dim = value.shape
    key_dim = key.shape[-1]
    layout = ChunkLayout(lengths or [tokens], chunk_size)
    query, key, value, decay, beta = (layout.chunked(x) for x in (query, key, value, decay, beta[..., None]))

    build = _decayed_by_head if decay.shape[-1] == 1 else _decayed_by_channel
    chunk = build(query, beta * key, key, decay)
    # Everything that is written, as a function of the state at the chunk's start: written = fresh - seen @ state.
    inputs = torch.cat((beta * value, chunk.writer), -1)
    written = torch.linalg.solve_triangular(chunk.coupling, inputs, upper=False, unitriangular=True)
    fresh, seen = written.split((value_dim, key_dim), -1)
    added, removed = (chunk.key.mT @ written).split((value_dim, key_dim), -1)
    kept = torch.diag_embed(chunk.factor.squeeze(-2).expand(*removed.shape[:-1])) - removed

    state = value.new_zeros(batch, heads, key_dim, value_dim) if initial_state is None else initial_state.float()
    states, final = _scan(kept, added, state.flatten(0, 1), layout.starts)
    output = chunk.query @ states + chunk.scores @ (fresh - seen @ states)
    return layout.unchunked(output, batch), final.unflatten(0, (batch, heads))


def _decayed_by_head(query: Tensor, writer: Tensor, key: Tensor, decay: Tensor) -> _Block:
    """One block a chunk, from tensors [sequences, chunks, tokens, channels] with one log decay a token."""
    tokens = decay.shape[-2]
    below = torch.ones(tokens, tokens, dtype=torch.bool, device=decay.device).tril(-1)
    # [..., i, j]: the sum over the tokens after j up to i, each sum on its own.
    sums = decay.expand(*decay.shape[:-1], tokens).masked_fill(~below, 0).cumsum(-2)
    pairs = sums.exp().tril()
    from_start = decay.cumsum(-2).exp()
    transposed = key.mT
    return _Block(
        query=query * from_start,
        writer=writer * from_start,
        key=key * pairs[..., -1, :, None],
        factor=from_start[..., -1:, :],
        scores=(query @ transposed) * pairs,
        coupling=(writer @ transposed) * pairs,
    )


def _decayed_by_channel(query: Tensor, writer: Tensor, key: Tensor, decay: Tensor) -> _Block:
    """One block a chunk, from tensors [sequences, chunks, tokens, channels] with a log decay a token and channel.

    Blocks of 1, 2, 4, ... tokens are merged: with queries decayed from the start of the later block and keys to the end
    of the earlier one, all scores between the two are one plain product.
    """
    query, writer, key, factor = (x.unsqueeze(-2) for x in (query, writer, key, decay.exp()))
    blocks = _Block(query * factor, writer * factor, key, factor, query @ key.mT, writer @ key.mT)
    while blocks.key.shape[-3] > 1:
        early, late = (_Block(*side) for side in zip(*map(_neighbours, blocks), strict=True))
        transposed = early.key.mT
        blocks = _Block(
            query=torch.cat((early.query, late.query * early.factor), -2),
            writer=torch.cat((early.writer, late.writer * early.factor), -2),
            key=torch.cat((early.key * late.factor, late.key), -2),
            factor=early.factor * late.factor,
            scores=_lower(early.scores, late.query @ transposed, late.scores),
            coupling=_lower(early.coupling, late.writer @ transposed, late.coupling),
        )
    return _Block(*(x.squeeze(-3) for x in blocks))


def _neighbours(blocks: Tensor) -> tuple[Tensor, ...]:
    """[..., blocks, rows, columns] -> the even and the odd ones, [..., blocks / 2, rows, columns] each."""
    return blocks.unflatten(-3, (-1, 2)).unbind(-3)


def _lower(first: Tensor, below: Tensor, second: Tensor) -> Tensor:
    """[[first, 0], [below, second]]."""
    return torch.cat((F.pad(first, (0, first.shape[-1])), torch.cat((below, second), -1)), -2)


def _scan(kept: Tensor, added: Tensor, state: Tensor, starts: frozenset[int]) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start, [sequences, chunks, key_dim, value_dim], and the last one.

    state_(n+1) = kept_n state_n + added_n, from zero at the chunks in `starts`.
    """
    states = []
    for number, (keep, add) in enumerate(zip(kept.unbind(1), added.unbind(1), strict=True)):
        if number in starts:
            state = torch.zeros_like(state)
        states.append(state)
        state = torch.baddbmm(add, keep, state)
    return torch.stack(states, dim=1), state
