"""Token sequences of one length, cut from text, in an order that is a function of the seed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gearshift.data.batch import Batch
from gearshift.data.order import shuffled


class Sequences(Protocol):
    """What a model learns from: an endless row of sequences, each of them a function of its number and the seed."""

    def draw(self, numbers: Iterable[int], seed: int = 0) -> Batch:
        """The sequences at these places of the order that `seed` decides. Each epoch has another order."""
        ...


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of equal length, in memory."""

    tokens: Tensor
    """[sequences, length], int64."""
    starts: Tensor | None = None
    """[sequences, length], bool: where documents begin (see `Batch`). None: each sequence is one text."""
    counted: Tensor | None = None
    """[sequences, length], bool: the tokens to predict. None: all are."""

    @classmethod
    def of(cls, batch: Batch) -> "TokenSequences":
        """The rows of a batch."""
        return cls(batch.tokens, batch.starts, batch.counted)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return self.tokens.shape[1]

    @property
    def all(self) -> Batch:
        """Every sequence, once, in the text's order."""
        return Batch(self.tokens, self.starts, self.counted)

    def draw(self, numbers: Iterable[int], seed: int = 0) -> Batch:
        """See `Sequences`."""
        chosen = [shuffled(number % len(self), len(self), seed, 0, number // len(self)) for number in numbers]
        return self.all.rows(chosen)

    def split(self, held_out: int) -> tuple["TokenSequences", "TokenSequences"]:
        """(the rest, `held_out` sequences spread evenly over the text). ValueError if nothing would be left."""
        if not 0 < held_out < len(self):
            raise ValueError(too_few(len(self), self.length, held_out))
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.from_numpy(spread(held_out, len(self)))] = True
        rest, kept = self.all.rows(~chosen), self.all.rows(chosen)
        return TokenSequences.of(rest), TokenSequences.of(kept)


def spread(count: int, size: int) -> np.ndarray:
    """`count` of the numbers below `size`, evenly spread, [count], int64, rising."""
    return np.linspace(0, size - 1, count).round().astype(np.int64)


def too_few(sequences: int, length: int, held_out: int, where: str = "") -> str:
    """Why `held_out` sequences cannot be held out."""
    return (
        f"the text{where} gives {sequences} sequences of {length} tokens: too few to hold out {held_out} and"
        " train on the rest; use more text, shorter sequences or a smaller held_out"
    )


def load_sequences(text: str, tokenizer: Any, length: int, limit: int | None = None) -> TokenSequences:
    """`text` as consecutive sequences of `length` tokens, at most `limit`. ValueError if it is too short for one."""
    excerpt = text if limit is None else text[: limit * length * 16]  # no tokenizer here averages 16 letters a token
    tokens = tokenizer(excerpt, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // length if limit is None else min(limit, len(tokens) // length)
    if count == 0:
        raise ValueError(f"the text is too short: {len(tokens)} tokens do not make one sequence of {length}")
    return TokenSequences(torch.tensor(tokens[: count * length]).view(count, length))
