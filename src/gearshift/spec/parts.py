"""The halves of a block, as far as they are the same for every kind: mixers and MLPs."""

import math
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field

from gearshift.spec.base import Spec

TOKENS = -1
"""In a state's shape, the dimension that grows by one with every token."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StateTensor:
    """One tensor that a mixer keeps between the tokens of one sequence.

    The shape leaves out the batch. Where it holds `TOKENS`, the tensor grows with the sequence, up to `max_tokens`
    if that is set (a window). `dtype` None means the dtype of the activations.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    max_tokens: int | None = None

    @property
    def grows(self) -> bool:
        return TOKENS in self.shape

    @property
    def token_dim(self) -> int | None:
        """The dimension that grows, counted with the batch as dimension 0; None for a fixed size."""
        return self.shape.index(TOKENS) + 1 if self.grows else None

    def elements(self, tokens: int) -> int:
        """The number of elements after `tokens` tokens."""
        kept = tokens if self.max_tokens is None else min(tokens, self.max_tokens)
        return math.prod(kept if size == TOKENS else size for size in self.shape)

    def bytes(self, tokens: int, dtype: str) -> int:
        """The size in bytes after `tokens` tokens, with activations in `dtype`."""
        return self.elements(tokens) * DTYPE_BYTES[self.dtype or dtype]


class NormSpec(Spec):
    """A normalisation over the channels."""

    type: Literal["rms_norm"] = "rms_norm"
    """The kind of norm."""
    epsilon: float = Field(default=1e-6, gt=0)
    """Added to the mean square before the root."""
    zero_centered: bool = False
    """Whether the weights are kept as their difference from one: x is multiplied by 1 + weight."""


class MixerSpec(Spec):
    """The settings of one token mixer. Each kind adds its own fields; sizes left out are filled in by `resolved`."""

    type: str
    """The kind of mixer, as registered under `gearshift.mixers`."""

    def resolved(self, hidden_size: int) -> Self:
        """A copy with every derivable size filled in. ValueError if the sizes do not fit `hidden_size`."""
        return self

    def splits(self) -> dict[str, int]:
        """The sizes that tensor parallelism divides, by name; each process gets an equal share of every one of them.

        ValueError, with the reason, if the mixer as it is set cannot be split.
        """
        return {}

    def state(self) -> tuple[StateTensor, ...]:
        """What the mixer keeps of a sequence: the one declaration that caches, servers and costs read."""
        raise NotImplementedError


class MLPSpec(Spec):
    """The settings of the channel-mixing half of a block."""

    type: str
    """The kind of MLP, as registered under `gearshift.mlps`."""

    def splits(self) -> dict[str, int]:
        """The sizes that tensor parallelism divides, by name. ValueError, with the reason, if there is no way to."""
        return {}

    def idle_parameters(self, hidden_size: int, tokens: int = 1) -> int:
        """How many parameters a step over `tokens` tokens is expected not to read."""
        return 0
