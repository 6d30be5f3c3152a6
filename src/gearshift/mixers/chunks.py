"""Cutting sequences and packed documents into chunks of equal length, for recurrences that work chunk by chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_SIZE = 64
"""Tokens of a chunk, a power of two. On a CPU 32 and 64 are equally fast and 16 is slower; 64 scans fewer chunks."""


class ChunkLayout:
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
