"""What a training step reads: rows of tokens, where documents begin in them, and which of them are to be learnt."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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
    counted: Tensor | None = None
    """[rows, length], bool, on the CPU: True where a token is one to predict. None: all are."""

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

    @cached_property
    def targeted(self) -> Tensor | None:
        """[positions], int64, on the CPU: the positions of `inputs`, flattened, whose next token counts. None: all.

        A row's last position has no next token, nor has the last one of a packed document.
        """
        if self.counted is None:
            return None
        followed = self.counted[:, 1:] if self.starts is None else self.counted[:, 1:] & ~self.starts[:, 1:]
        return F.pad(followed, (0, 1)).flatten().nonzero().flatten()

    @property
    def weight(self) -> int:
        """What the batch counts for beside others: its rows, or the tokens to predict where not all count."""
        return len(self) if self.targeted is None else len(self.targeted)

    def rows(self, chosen: Any) -> "Batch":
        """These rows: a slice, indices or a mask."""
        starts, counted = (None if part is None else part[chosen] for part in (self.starts, self.counted))
        return Batch(self.tokens[chosen], starts, counted)

    def split(self, size: int) -> list["Batch"]:
        """Parts of `size` rows, the last one of what is left."""
        return [self.rows(slice(first, first + size)) for first in range(0, len(self), size)]

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tokens on a device, without waiting for them to arrive."""
        return replace(self, tokens=self.tokens.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in memory that a CUDA device copies from by itself."""
        return replace(self, tokens=self.tokens.pin_memory())
