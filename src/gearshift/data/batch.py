"""What a training step reads: rows of tokens, and where documents begin in them."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length.

    With `starts`, they are packed documents, which must not see each other: the model reads all rows as one sequence
    (`inputs`) with the boundaries `cu_seqlens`.
    """

    tokens: Tensor
    """[rows, length], int64."""
    starts: Tensor | None = None
    """[rows, length], bool, on the CPU: True where a document begins. None: each row is one text."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def inputs(self) -> Tensor:
        """What the model reads: [rows, length], or [1, rows * length] of packed documents."""
        return self.tokens if self.starts is None else self.tokens.flatten()[None]

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """[documents + 1], int32, on the CPU: the boundaries in `inputs`, at every row's end too. None: not packed."""
        if self.starts is None:
            return None
        starts = self.starts.clone()
        starts[:, 0] = True
        return F.pad(starts.flatten(), (0, 1), value=True).nonzero().flatten().int()

    def by_row(self, hidden: Tensor) -> Tensor:
        """What the model made of `inputs` [..., channels], as [rows, length, channels]."""
        return hidden.reshape(*self.tokens.shape, hidden.shape[-1])

    def split(self, size: int) -> list["Batch"]:
        """Parts of `size` rows, the last one of what is left."""
        tokens = self.tokens.split(size)
        starts = [None] * len(tokens) if self.starts is None else self.starts.split(size)
        return [Batch(*part) for part in zip(tokens, starts, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tokens on a device, without waiting for them to arrive."""
        return replace(self, tokens=self.tokens.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in memory that a CUDA device copies from by itself."""
        return replace(self, tokens=self.tokens.pin_memory())
