"""Token sequences of one length, cut from text, in an order that is a function of (seed, step)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {".txt", ".md", ".rst", ".text"}


def read_text(path: str | Path) -> str:
    """The text of a file, or of all text files below a folder, sorted by path. ValueError if there is none."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no text at {path}: there is no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no text in {path}: it holds no file that ends in {', '.join(sorted(SUFFIXES))}")
    parts = []
    for file in files:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: byte {error.start} cannot be read") from None
    return "\n\n\n".join(parts)


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of equal length."""

    tokens: Tensor
    """[sequences, length], int64."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return self.tokens.shape[1]

    def batch(self, step: int, size: int, seed: int = 0) -> Tensor:
        """The sequences of step `step`, [size, length]: a function of (seed, step), each epoch in another order."""
        drawn = range(step * size, (step + 1) * size)
        return torch.stack([self.tokens[self._order(index // len(self), seed)[index % len(self)]] for index in drawn])

    def _order(self, epoch: int, seed: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self))

    def split(self, held_out: int) -> tuple["TokenSequences", "TokenSequences"]:
        """(the rest, `held_out` sequences spread evenly over the text). ValueError if nothing would be left."""
        if not 0 < held_out < len(self):
            raise ValueError(
                f"the text gives {len(self)} sequences of {self.length} tokens: too few to hold out {held_out} and"
                " train on the rest; use more text or shorter sequences"
            )
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.linspace(0, len(self) - 1, held_out).round().long()] = True
        return TokenSequences(self.tokens[~chosen]), TokenSequences(self.tokens[chosen])


def load_sequences(text: str, tokenizer: Any, length: int, limit: int | None = None) -> TokenSequences:
    """`text` as consecutive sequences of `length` tokens, at most `limit`. ValueError if it is too short for one."""
    excerpt = text if limit is None else text[: limit * length * 16]  # no tokenizer here averages 16 letters a token
    tokens = tokenizer(excerpt, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // length if limit is None else min(limit, len(tokens) // length)
    if count == 0:
        raise ValueError(f"the text is too short: {len(tokens)} tokens do not make one sequence of {length}")
    return TokenSequences(torch.tensor(tokens[: count * length]).view(count, length))
