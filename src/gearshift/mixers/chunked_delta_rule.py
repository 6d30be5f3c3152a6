"""The gated delta rule in chunks of tokens: the same numbers as token by token, with few and large matrix products.

Within a chunk that starts from the state S, the rows that are written to the state and the outputs are linear in S
(the WY form of arXiv 2406.06484, with decays as in 2412.06464 and 2510.26692):

    written = T (beta v - (beta k decayed) S)        output = (q decayed) S + P written

P_ij and the matrix whose inverse T is, I + L, are causal scores sum_c x_ic k_jc exp(g_(j+1)c + ... + g_ic). Splitting
that exponential into exp(G_i) exp(-G_j) overflows for strong decays. Here a chunk is built up by merging neighbouring
blocks of 1, 2, 4, ... tokens: queries are decayed from the start of their block, keys to the end of theirs, so
that the scores between two neighbours are one plain product. A factor is never larger than one and never divided by,
hence no decay, however strong, gives anything but a small relative error. The inverse grows along with the scores:

    [[I + L1, 0], [X, I + L2]]^-1 = [[T1, 0], [-T2 X T1, T2]]
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_SIZE = 64
"""Tokens of a chunk, a power of two. See benchmarks: 32 and 64 are equally fast on a CPU, 16 is slower."""


class Block(NamedTuple):
    """Blocks of neighbouring tokens, leading dimensions [sequences, chunks, blocks]."""

    query: Tensor
    """[..., tokens, key_dim], decayed from the start of the block."""
    writer: Tensor
    """[..., tokens, key_dim], the keys times beta, decayed from the start of the block."""
    key: Tensor
    """[..., tokens, key_dim], decayed to the end of the block."""
    factor: Tensor
    """[..., 1, key_dim or 1], the decay over the whole block."""
    scores: Tensor
    """[..., tokens, tokens], P: how much of each written row each query reads."""
    inverse: Tensor
    """[..., tokens, tokens], T."""


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
    layout = _Layout(lengths or [tokens], chunk_size)
    query, key, value, decay, beta = (layout.chunked(x) for x in (query, key, value, decay, beta[..., None]))

    chunk = _merged(_tokens_as_blocks(query, beta * key, key, decay.exp()))
    # Everything that is written, as a function of the state at the chunk's start: written = fresh - seen @ state.
    fresh, seen = (chunk.inverse @ torch.cat((beta * value, chunk.writer), -1)).split((value_dim, key_dim), -1)
    added, removed = (chunk.key.mT @ torch.cat((fresh, seen), -1)).split((value_dim, key_dim), -1)
    kept = torch.diag_embed(chunk.factor.squeeze(-2).expand(*chunk.key.shape[:-2], key_dim)) - removed

    state = value.new_zeros(batch, heads, key_dim, value_dim) if initial_state is None else initial_state.float()
    states, final = _scan(kept, added, state.flatten(0, 1), layout.starts)
    output = chunk.query @ states + chunk.scores @ (fresh - seen @ states)
    return layout.unchunked(output, batch), final.unflatten(0, (batch, heads))


def _tokens_as_blocks(query: Tensor, writer: Tensor, key: Tensor, factor: Tensor) -> Block:
    """Blocks of one token each, from tensors [sequences, chunks, tokens, channels]."""
    query, writer, key, factor = (x.unsqueeze(-2) for x in (query, writer, key, factor))
    scores = query @ key.mT
    return Block(query * factor, writer * factor, key, factor, scores, inverse=torch.ones_like(scores))


def _merged(block: Block) -> Block:
    """One block a chunk, by merging neighbours until none are left; the blocks' dimension is dropped."""
    while block.key.shape[-3] > 1:
        early, late = (Block(*side) for side in zip(*map(_neighbours, block), strict=True))
        key = early.key.mT
        coupling = late.inverse @ (late.writer @ key) @ early.inverse
        block = Block(
            query=torch.cat((early.query, late.query * early.factor), -2),
            writer=torch.cat((early.writer, late.writer * early.factor), -2),
            key=torch.cat((early.key * late.factor, late.key), -2),
            factor=early.factor * late.factor,
            scores=_lower(early.scores, late.query @ key, late.scores),
            inverse=_lower(early.inverse, -coupling, late.inverse),
        )
    return Block(*(x.squeeze(-3) for x in block))


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


class _Layout:
    """How documents are laid out in whole chunks: each starts a chunk, and its last chunk is filled up with nothing.

    A token with zero key and zero log decay leaves the state as it is, so filling up with zeros is exact.
    """

    def __init__(self, lengths: Sequence[int], chunk_size: int):
        self.lengths = lengths
        self.chunk_size = min(chunk_size, 1 << (max(lengths) - 1).bit_length())
        self.chunks = [-(-length // self.chunk_size) for length in lengths]
        ends = torch.tensor(self.chunks).cumsum(0).tolist()
        self.starts = frozenset(ends[:-1])

    def chunked(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads, channels] -> [batch * heads, chunks, chunk_size, channels]."""
        x = x.transpose(1, 2)
        total = sum(self.chunks) * self.chunk_size
        if len(self.lengths) == 1:
            x = F.pad(x, (0, 0, 0, total - x.shape[2]))
        else:
            empty = x.new_zeros(*x.shape[:2], total, x.shape[3])
            x = empty.index_copy(2, self._places(x.device), x)
        return x.reshape(-1, sum(self.chunks), self.chunk_size, x.shape[-1])

    def unchunked(self, x: Tensor, batch: int) -> Tensor:
        """[batch * heads, chunks, chunk_size, channels] -> [batch, tokens, heads, channels]."""
        x = x.flatten(1, 2).unflatten(0, (batch, -1))
        if len(self.lengths) == 1:
            x = x[:, :, : self.lengths[0]]
        else:
            x = x.index_select(2, self._places(x.device))
        return x.transpose(1, 2)

    def _places(self, device: torch.device) -> Tensor:
        """[tokens], where each token lies among the chunks' tokens."""
        lengths, chunks = torch.tensor(self.lengths), torch.tensor(self.chunks)
        shifts = (chunks.cumsum(0) - chunks) * self.chunk_size - (lengths.cumsum(0) - lengths)
        return (torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)).to(device)
